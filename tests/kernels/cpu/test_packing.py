import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moeify import Assignment, backends
from moeify.experts import FFN
from moeify.kernels.cpu.packing import cached, may_pack, pack, unpack


class Maker:
    """Doubles what it is given, and counts how often."""

    def __init__(self, weight):
        self.weight, self.made = weight, 0

    def __call__(self, owner=None, name="twice"):
        return cached(self.weight if owner is None else owner, name, [self.weight], self._make)

    def _make(self):
        self.made += 1
        return 2 * self.weight.detach()


@pytest.fixture
def maker():
    return Maker(nn.Parameter(torch.randn(3, 40, 5)))


def test_a_copy_is_made_once(maker):
    assert maker() is maker()
    assert maker.made == 1
    assert maker(name="other") is not maker()


@torch.no_grad()
def in_place(weight):
    weight[1, 7, 3] += 1  # one number of 600, seen by the version


def by_data(weight):
    weight.data += 1  # as PEFT merges; seen by the content


def by_optimizer(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight]).step()


def by_loading(weight):
    holder = nn.Module()
    holder.weight = weight
    holder.load_state_dict({"weight": torch.randn_like(weight)})


def by_dtype(weight):
    holder = nn.Module()
    holder.weight = weight
    holder.bfloat16().float()


@pytest.mark.parametrize("change", [in_place, by_data, by_optimizer, by_loading, by_dtype])
def test_a_copy_is_never_older_than_its_weights(change, maker):
    maker()
    change(maker.weight)
    assert torch.equal(maker(), 2 * maker.weight)


def test_a_replaced_parameter_is_copied_anew():
    owner = FFN(2, 4, 3)
    for _ in range(20):  # the new one often gets the memory of the old one
        maker = Maker(nn.Parameter(torch.randn(2, 3, 4)))
        owner.down_proj = maker.weight
        assert torch.equal(maker(owner), 2 * owner.down_proj)


def test_another_view_of_the_same_memory_is_copied_anew(maker):
    maker()
    transposed = maker.weight.transpose(1, 2)
    assert cached(maker.weight, "twice", [transposed], lambda: 2 * transposed).shape == (3, 5, 40)


def test_copies_go_with_their_owner():
    maker = Maker(nn.Parameter(torch.randn(2, 3, 4)))
    copy = weakref.ref(maker())
    del maker
    gc.collect()
    assert copy() is None


def test_copies_are_allowed_per_model_and_freed_with_the_permission(monkeypatch):
    experts, other = FFN(2, 4, 3), FFN(2, 4, 3)
    model = pack(nn.Sequential(experts))
    assert may_pack(experts)
    assert not may_pack(other)
    copy = weakref.ref(Maker(experts.down_proj)())
    unpack(model)
    gc.collect()
    assert copy() is None
    assert not may_pack(experts)
    monkeypatch.setenv("MOEIFY_PACK", "1")
    assert may_pack(other)


def test_empty_weights_can_be_copied():
    assert Maker(torch.empty(0, 3, 4))().shape == (0, 3, 4)


class OnPacked(TorchDispatchMode):
    """The operators that are called with packed matrices."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(value, torch.Tensor) and value.is_mkldnn for value in args):
            self.seen.add(func.overloadpacket)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("counts", [[64, 64], [70, 130], [128, 0]])
@torch.no_grad()
def test_a_packed_matrix_is_multiplied_with_and_never_copied(counts):
    experts = FFN(2, 8, 16)
    pack(experts)
    source = torch.arange(sum(counts))
    routing = Assignment(
        counts=torch.tensor(counts), source=source, weight=torch.rand(len(source)), shape=(len(source),)
    )
    x = torch.randn(len(source), 8)
    backends.run("onednn", x, routing, experts)
    with OnPacked() as packed:
        backends.run("onednn", x, routing, experts)
    assert packed.seen == {torch.ops.mkldnn._linear_pointwise}
