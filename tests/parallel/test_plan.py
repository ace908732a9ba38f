"""Layouts are legal, priced by their work, and the plan says what binds the fastest."""

import json
import tomllib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeify import Recipe, sparsify
from moeify.flops import count
from moeify.parallel import DEVICES, TARGETS, Cluster, Layout, Link, ModelShape, Step, Workload, plan
from moeify.parallel.emit import EMIT
from moeify.parallel.layout import layouts
from tiny_models import deepseek_v3, gpt2, mixtral

SHAPE = ModelShape(
    name="sparse", width=2048, blocks=16, sparse_layers=16, num_experts=64, k=8.0, hidden=1024.0,
    dense_parameters=3e8, embedding=2e8, dense_flops=6e8, head_flops=2e8, attention_flops=2e5, vocabulary=50000,
    heads=16,
)  # fmt: skip


def cluster(nodes=1, memory=80e9, intra=300e9):
    return Cluster(
        nodes=nodes, devices_per_node=8, device=replace(DEVICES["h100"], memory=memory),
        intra=Link(bandwidth=intra, latency=1e-5), inter=Link(bandwidth=40e9, latency=2e-5),
    )  # fmt: skip


def step(target="megatron", workload=None, **changed):
    return Step(shape=SHAPE, cluster=cluster(**changed), workload=workload or Workload.balanced(64), length=2048,
                target=TARGETS[target])  # fmt: skip


@pytest.mark.parametrize(
    "model", [mixtral, deepseek_v3, lambda: sparsify(gpt2(), Recipe(num_experts=4), verbose=False)]
)
def test_the_shape_of_a_model_holds_all_of_its_parameters_and_flops(model):
    built = model()
    shape, counted = ModelShape.of(built), count(built)
    assert shape.parameters == pytest.approx(counted.parameters, rel=1e-6)
    experts = shape.sparse_layers * shape.k * 2 * shape.expert_parameters
    assert shape.dense_flops + shape.head_flops + experts == pytest.approx(counted.flops, rel=1e-6)
    assert shape.width == built.config.hidden_size
    assert shape.blocks == built.config.num_hidden_layers


def test_a_configuration_has_the_shape_of_its_model():
    model = mixtral()
    assert replace(ModelShape.of_config(model.config), name="") == replace(ModelShape.of(model), name="")


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="make it sparse"):
        ModelShape.of(gpt2())


@given(st.sampled_from(sorted(TARGETS)), st.sampled_from([1, 2]), st.sampled_from([16, 48]))
@settings(max_examples=8, deadline=None)
def test_layouts_use_every_device_once_and_every_sequence_once(name, nodes, sequences):
    found = list(layouts(SHAPE, cluster(nodes), TARGETS[name], sequences))
    assert found
    assert len(set(found)) == len(found)
    for layout in found:
        assert layout.world == 8 * nodes
        assert layout.sequences == sequences
        assert SHAPE.num_experts % layout.ep == 0


def test_transformers_takes_every_layout_that_is_planned_for_it():
    from transformers.distributed import DistributedConfig

    for layout in layouts(SHAPE, cluster(), TARGETS["transformers"], 16):
        values = json.loads(EMIT["transformers"](layout, SHAPE, 2048))["distributed_config"]
        made = DistributedConfig(**values)
        assert made.dp_size * made.tp_size * made.pp_size == 8
        assert made.efsdp_size == layout.efsdp * layout.etp


def test_a_layout_that_transformers_refuses_is_refused_here():
    from transformers.distributed import DistributedConfig

    for layout in (Layout(fsdp=4, pp=2), Layout(fsdp=4, tp=2, ep=4), Layout(fsdp=2, tp=4, ep=2)):
        ours = TARGETS["transformers"].refuse(layout, SHAPE)
        try:
            DistributedConfig(fsdp_size=layout.fsdp, tp_size=layout.tp, pp_size=layout.pp, ep_size=layout.ep)
            theirs = None
        except ValueError as error:
            theirs = str(error)
        assert (ours is None) == (theirs is None), (ours, theirs)


def test_configurations_say_the_layout():
    layout = Layout(fsdp=4, tp=2, pp=2, ep=8, micro_batch=2, accumulation=4, recompute=True)
    toml = tomllib.loads(EMIT["torchtitan"](layout, SHAPE, 2048))
    assert toml["parallelism"]["expert_parallel_degree"] == 8
    assert toml["training"] == {"local_batch_size": 8, "global_batch_size": 32, "seq_len": 2048}
    assert toml["activation_checkpoint"]["mode"] == "full"
    flags = EMIT["megatron"](layout, SHAPE, 2048).replace("\\\n", "").split()
    for name, value in {"expert-model-parallel-size": "8", "global-batch-size": "32", "num-experts": "64"}.items():
        assert flags[flags.index(f"--{name}") + 1] == value
    assert "--sequence-parallel" in flags


def test_more_micro_batches_take_as_many_times_the_compute_and_no_more_of_the_optimizer():
    one, four = (step().price(Layout(fsdp=8, ep=8, accumulation=m)).seconds for m in (1, 4))
    for kind in ("dense", "experts", "exchange", "head"):
        assert four[kind] == pytest.approx(4 * one[kind])
    assert four["optimizer"] == one["optimizer"]


def test_stages_split_the_compute_and_wait_for_each_other():
    whole = step().price(Layout(fsdp=4, ep=4, accumulation=8)).seconds
    split = step().price(Layout(fsdp=4, pp=2, ep=4, accumulation=8)).seconds
    assert split["dense"] == pytest.approx(whole["dense"] / 2)
    assert split["bubble"] > whole["bubble"] == 0


@given(st.floats(0.0, 1.5))
@settings(max_examples=20, deadline=None)
def test_skew_never_makes_a_step_faster_and_costs_nothing_without_expert_parallelism_but_tiles(skew):
    layout = Layout(fsdp=8, ep=8)
    balanced, skewed = (step(workload=Workload.skewed(64, s, layers=4)).price(layout).step for s in (0.0, skew))
    assert balanced <= skewed * (1 + 1e-9)
    alone = [step(workload=Workload.skewed(64, s)).price(Layout(fsdp=8)).step for s in (0.0, skew)]
    assert alone[1] <= alone[0] * 1.05


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (8, 1), (1, 8), (2, 2), (2, 8), (4, 2)])
def test_the_ranks_of_a_replica_keep_the_optimizer_state_of_every_parameter_once(tp, ep):
    held = step().price(Layout(fsdp=8 // tp, tp=tp, ep=ep)).bytes["optimizer"]
    assert 8 * held == pytest.approx(12 * SHAPE.parameters)


def test_sharding_saves_memory_and_the_fullest_rank_sets_its_activations():
    bytes_of = {n: step("transformers").price(Layout(fsdp=n, dp=8 // n)).bytes for n in (1, 8)}
    assert bytes_of[8]["optimizer"] == pytest.approx(bytes_of[1]["optimizer"] / 8)
    hot = step(workload=Workload.skewed(64, 1.0)).price(Layout(fsdp=8, ep=8))
    assert hot.bytes["activations"] > step().price(Layout(fsdp=8, ep=8)).bytes["activations"]


def test_the_plan_names_the_wall_that_binds():
    roomy = plan(SHAPE, cluster(memory=1e13), length=2048, sequences=32, target="megatron")
    assert roomy.wall == "compute"
    assert not roomy.too_large
    tight = plan(SHAPE, cluster(memory=30e9), length=2048, sequences=32, target="megatron")
    assert tight.wall == "memory"
    assert "memory rules out" in tight.explain()
    slow = plan(SHAPE, cluster(memory=30e9, intra=1e8), length=2048, sequences=32)
    assert next(iter(slow.best.walls)) == "network"
    assert "runner-up" in tight.explain()
    assert [c.cost.step for c in tight.choices] == sorted(c.cost.step for c in tight.choices)


def test_a_hot_expert_is_named_and_can_change_the_layout():
    hot = Workload.counted(torch.tensor([1000] + [1] * 63)[None, None])
    found = plan(SHAPE, cluster(memory=25e9), hot, length=2048, sequences=32, target="megatron")
    assert "the fullest expert of a layer gets 60.2 times the mean" in found.explain()
    calm = plan(SHAPE, cluster(memory=25e9), length=2048, sequences=32, target="megatron")
    assert found.best.cost.step > calm.best.cost.step


def test_a_model_that_fits_nowhere_and_a_program_that_is_not_known_are_refused():
    with pytest.raises(ValueError, match="fits no layout of 8 devices of 1 GB"):
        plan(SHAPE, cluster(memory=1e9), length=2048, sequences=8).best  # noqa: B018
    with pytest.raises(ValueError, match="no layouts of 'deepspeed'"):
        plan(SHAPE, cluster(), length=2048, sequences=8, target="deepspeed")
