import json
from dataclasses import dataclass
from functools import partial

import pytest

from moeify import registry
from moeify.balance import Quantile, Sign
from moeify.capacity import double
from moeify.registry import decode, encode, lookup, names, register
from moeify.routers import ExpertGroups, InputWeights, Residual, Similarity, TopK, sigmoid, softmax
from moeify.routers.limited import capacity
from moeify.routers.shared_routing import shared_routing


@pytest.fixture(autouse=True)
def forget_what_a_test_registers(monkeypatch):
    monkeypatch.setattr(registry, "_BY_NAME", {kind: dict(known) for kind, known in registry._BY_NAME.items()})


@pytest.mark.parametrize(
    ("kind", "thing"),
    [
        ("router", TopK),
        ("router", partial(TopK, k=3, score=sigmoid, expert_groups=ExpertGroups(4, 2, "top2"), scale=2.5)),
        ("router", partial(capacity, factor=1.5, capacity=double)),
        ("controller", Sign(rate=0.01)),
        ("controller", Quantile()),
        ("score", softmax),
        ("expert_groups", ExpertGroups(8, 4)),
    ],
)
def test_what_is_written_as_json_is_read_back(kind, thing):
    back = decode(kind, json.loads(json.dumps(encode(kind, thing))))
    if isinstance(thing, partial):
        assert (back.func, back.keywords) == (thing.func, thing.keywords)
    else:
        assert back == thing


def test_options_given_by_position_are_written_too():
    @register("split", "deeper")
    def deeper(depth, step, name):
        return depth, step, name

    written = encode("split", partial(deeper, 3, step=2))
    assert written == {"name": "deeper", "depth": 3, "step": 2}
    assert decode("split", written)(name="mlp") == (3, 2, "mlp")


def test_settings_are_what_was_given_and_the_defaults_of_the_rest():
    found = registry.settings("router", {"name": "capacity", "router": {"name": "topk", "k": 1}, "factor": 1.5})
    assert found["router"] == "capacity"
    assert (found["router.factor"], found["router.eval_factor"]) == (1.5, 2.0)
    assert (found["router.router"], found["router.router.k"], found["router.router.score"]) == ("topk", 1, "softmax")


def test_a_name_alone_is_enough():
    assert decode("router", "topk") is TopK
    assert decode("controller", "sign") == Sign()


def test_names_are_sorted_and_by_kind():
    assert names("score") == ["capped_sigmoid", "sigmoid", "softmax", "sqrt_softplus"]
    assert names("nothing of the kind") == []


def test_a_misspelt_name_suggests_the_right_one():
    with pytest.raises(ValueError, match="no score is called 'softmx'; did you mean 'softmax'"):
        lookup("score", "softmx")


def test_a_name_far_from_all_lists_them():
    with pytest.raises(ValueError, match="known are: capped_sigmoid, sigmoid, softmax, sqrt_softplus"):
        lookup("score", "??")


def test_an_option_that_is_not_taken_is_named():
    with pytest.raises(ValueError, match="router 'topk' has no option 'normalise'; did you mean 'normalize'"):
        decode("router", {"name": "topk", "normalise": True})


@pytest.mark.parametrize("value", [3, ["topk"], {"k": 2}, None])
def test_what_is_neither_a_name_nor_a_mapping_is_refused(value):
    with pytest.raises(ValueError, match="router must be a name or a mapping with a 'name'"):
        decode("router", value)


def test_a_thing_without_a_name_cannot_be_written():
    with pytest.raises(ValueError, match=r"has no name.*@moeify\.register\('router'"):
        encode("router", lambda width, num_experts: None)


def test_a_name_is_given_once():
    @register("score", "mine")
    def mine(logits):
        return logits

    assert register("score", "mine")(mine) is mine
    with pytest.raises(ValueError, match="'mine' already means"):
        register("score", "mine")(lambda logits: logits)


def test_ones_own_dataclass_is_written_with_its_options():
    @register("controller", "still")
    @dataclass(frozen=True)
    class Still:
        rate: float = 0.0

    assert decode("controller", encode("controller", Still(2.0))) == Still(2.0)


def test_what_a_thing_is_called_with_is_no_option_of_a_file():
    with pytest.raises(ValueError, match="router 'topk' has no option 'width'"):
        decode("router", {"name": "topk", "width": 8})


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ({"name": "once", "router": {"name": "topk", "k": 1, "normalize": False}},
         partial(shared_routing, router=partial(TopK, k=1, normalize=False))),
        ("given", InputWeights),
        ({"name": "residual", "silent": 1}, partial(Residual, zero_experts=1)),
        ({"name": "topk", "per": "group"}, partial(TopK, per="sequence")),
        ({"name": "capacity", "router": "similarity", "per": "group"},
         partial(capacity, router=Similarity, per="sequence")),
        ({"name": "topk", "groups": {"name": "groups", "count": 4, "keep": 2}},
         partial(TopK, expert_groups=ExpertGroups(4, 2))),
        ({"name": "capacity", "router": {"name": "topk", "groups": None}},
         partial(capacity, router=partial(TopK, expert_groups=None))),
    ],
)  # fmt: skip
def test_files_of_earlier_versions_are_understood(former, now):
    assert encode("router", decode("router", former)) == encode("router", now)


def test_ones_own_router_may_have_a_former_name_and_option():
    @register("router", "once")
    def mine(width, num_experts, *, groups=1, per="token"):
        return width, num_experts, groups, per

    assert decode("router", {"name": "once", "groups": 3, "per": "group"})(8, 4) == (8, 4, 3, "group")
