"""Clusters are read from files, and refuse what does not describe one."""

import pytest

from moeify.parallel import DEVICES, Cluster, Device, GroupedCost, Link
from moeify.parallel.network import exchange, gather, reduce

TOML = """
nodes = 2
devices_per_node = 8
device = { like = "h100", memory = 94e9 }
intra = { bandwidth = 350e9, latency = 1e-5 }
inter = { bandwidth = 45e9, latency = 2e-5 }
"""


def cluster(nodes=2, devices_per_node=8):
    link = Link(bandwidth=100e9, latency=1e-5)
    slow = Link(bandwidth=10e9, latency=5e-5)
    return Cluster(nodes=nodes, devices_per_node=devices_per_node, device=DEVICES["h100"], intra=link, inter=slow)


def test_a_file_may_change_numbers_of_a_data_sheet(tmp_path):
    (tmp_path / "a.toml").write_text(TOML)
    found = Cluster.read(tmp_path / "a.toml")
    assert found.size == 16
    assert found.device.memory == 94e9
    assert found.device.flops == DEVICES["h100"].flops
    assert found.inter == Link(bandwidth=45e9, latency=2e-5)


def test_what_is_written_is_read_back_unchanged(tmp_path):
    device = Device(memory=8e9, flops=1e12, bandwidth=1e11, experts=GroupedCost(launch=1e-4))
    written = Cluster(nodes=3, devices_per_node=2, device=device, intra=Link(bandwidth=1e9, latency=0.0),
                      inter=Link(bandwidth=1e8, latency=1e-4))  # fmt: skip
    written.write(tmp_path / "c.json")
    assert Cluster.read(tmp_path / "c.json") == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("nodes = 2", ""), "lacks nodes"),
        (("nodes = 2", "nodes = 0"), "nodes of a cluster is 0"),
        (("h100", "k80"), "flops"),
        (("45e9", "-1"), "bandwidth of a link is -1"),
        (("latency = 2e-5", "delay = 2e-5"), "inter has no delay"),
        (("nodes = 2", "nodes = 2\ncolour = 1"), "a cluster has no colour"),
        (("nodes = 2", "nodes ="), "does not describe a cluster"),
    ],
)
def test_what_does_not_describe_a_cluster_is_named(tmp_path, change, message):
    (tmp_path / "a.toml").write_text(TOML.replace(*change))
    with pytest.raises(ValueError, match=message):
        Cluster.read(tmp_path / "a.toml")


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("")
    with pytest.raises(ValueError, match="in one of them"):
        Cluster.read(tmp_path / "a.yaml")


def test_a_group_fills_a_node_before_it_takes_the_next():
    found = cluster()
    assert found.across(4) == (4, 1)
    assert found.across(16) == (8, 2)
    assert found.across(2, stride=8) == (1, 2)


def test_collectives_take_the_slower_way_out_of_a_node():
    import torch

    found, sent = cluster(), torch.tensor(1e9, dtype=torch.float64)
    assert exchange(found, sent, 8) == pytest.approx(1e9 * 7 / 8 / 100e9 + 1e-5)
    outside = 1e9 * 8 / 16 / 10e9 + 5e-5
    assert exchange(found, sent, 16) == pytest.approx(1e9 * 7 / 16 / 100e9 + 1e-5 + outside)
    assert gather(found, 1e9, 8) == pytest.approx(1e9 * 7 / 8 / 100e9 + 3e-5)
    assert gather(found, 1e9, 16) == pytest.approx(max(1e9 * 7 / 8 / 100e9, 1e9 / 2 / 80e9) + 3e-5 + 5e-5)
    assert reduce(found, 1e9, 8) == 2 * gather(found, 1e9, 8)
    assert gather(found, 1e9, 1) == 0


def test_processes_that_share_cores_have_their_part_of_one_each():
    whole = cluster(nodes=1)
    part = whole.shared(2)
    assert part.device.flops == whole.device.flops / 4
    assert part.device.bandwidth == whole.device.bandwidth / 4
    assert part.intra == Link(bandwidth=25e9, latency=4e-5)
    assert part.device.experts.launch == 4 * whole.device.experts.launch
    assert part.device.experts.products == whole.device.experts.products
    assert whole.shared(8) == whole == whole.shared(64)
