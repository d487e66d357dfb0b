"""Checks the launch files without a cluster: their form, and that an experiment that has saved is started again.

Command:  python launch/check.py [FILE ...]        (`make lint` runs it)

Kubernetes' documents are checked by its own schemas, and so is the Job in a JobSet, whose other fields
jobset.schema.json knows. Exit code: 0, or 1 with a line for each fault.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

FOLDER = Path(__file__).parent
KUBERNETES = "1.33"  # the oldest that has all that is used: backoffLimitPerIndex
SAVED = 75  # the program's exit code when it was told to stop and has saved
CHIPS, TOPOLOGY = "google.com/tpu", "cloud.google.com/gke-tpu-topology"
SKY_FIELDS = {"name", "num_nodes", "resources", "workdir", "envs", "secrets", "file_mounts", "setup", "run"}
SBATCH = re.compile(r"#SBATCH --[a-z-]+(=\S+)?$")


def kubernetes(document: dict[str, Any]) -> Iterator[str]:
    """The faults of one document."""
    try:
        if document.get("kind") == "JobSet":
            jsonschema.validate(document, json.loads((FOLDER / "jobset.schema.json").read_text(encoding="utf-8")))
            for job in document["spec"]["replicatedJobs"]:
                yield from kubernetes({"apiVersion": "batch/v1", "kind": "Job", **job["template"]})
            return
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        if document["kind"] == "Job":
            yield from job_faults(document["spec"])
    except jsonschema.ValidationError as error:
        yield f"{'.'.join(map(str, error.absolute_path)) or 'document'}: {error.message[:200]}"
    except (KeyError, kubernetes_validate.SchemaNotFoundError):
        yield f"{document.get('apiVersion')} {document.get('kind')}: no known kind"


def job_faults(job: dict[str, Any]) -> Iterator[str]:
    """What no schema knows: the size of a slice, and what the exit codes do."""
    pod = job["template"]["spec"]
    chips = sum(int(c["resources"]["limits"].get(CHIPS, 0)) for c in pod["containers"])
    shape = pod.get("nodeSelector", {}).get(TOPOLOGY)
    if shape:
        size, hosts = math.prod(map(int, shape.split("x"))), 1 if "backoffLimitPerIndex" in job else job["completions"]
        if chips * hosts != size:
            yield f"{hosts} x {chips} chips are not the {size} of {shape}"
    if pod.get("restartPolicy") != "Never":
        yield "restartPolicy: a podFailurePolicy needs Never"
    rules = job.get("podFailurePolicy", {}).get("rules", [])
    if not any(r["action"] == "Ignore" and SAVED in r.get("onExitCodes", {}).get("values", []) for r in rules):
        yield f"podFailurePolicy: exit code {SAVED} counts as a failure"


def sky(task: dict[str, Any]) -> Iterator[str]:
    """The faults of a SkyPilot task."""
    for name in task.keys() - SKY_FIELDS:
        yield f"{name}: no field of a task"
    if SAVED not in task["resources"].get("job_recovery", {}).get("recover_on_exit_codes", []):
        yield f"job_recovery: exit code {SAVED} counts as a failure"


def sbatch(text: str) -> Iterator[str]:
    """The faults of a batch script's directives; Slurm reads none after the first command."""
    lines = text.splitlines()
    commands = [i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")]
    for i, line in enumerate(lines):
        if line.startswith("#SBATCH") and not (SBATCH.match(line) and i < commands[0]):
            yield f"line {i + 1}: no directive that Slurm reads"
    if "--requeue" not in text or f"code == {SAVED}" not in text:
        yield f"exit code {SAVED} does not requeue the job"


def faults(path: Path) -> list[str]:
    """All of a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".sbatch":
        return list(sbatch(text))
    try:
        documents = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        return [" ".join(str(error).split())]
    return [fault for one in documents for fault in (sky(one) if path.name.startswith("sky") else kubernetes(one))]


def main(paths: list[Path]) -> int:
    """Prints the faults of all files, and returns the exit code."""
    found = [f"{path}: {fault}" for path in paths for fault in faults(path)]
    print("\n".join(found) or f"{len(paths)} launch files are in order")
    return 1 if found else 0


if __name__ == "__main__":
    given = [Path(name) for name in sys.argv[1:]]
    sys.exit(main(given or sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("*.sbatch")])))
