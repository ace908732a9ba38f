"""Every law of backends can fail: for each there is a backend that breaks it, and the definition breaks none."""

import pytest
import torch

from laws import broken
from moeify.backends import Backend, compose, order, register_backend
from moeify.testing import backends, check_backend


def never(*call):
    return None


def compose_twice(x, routing, experts):
    return 2 * compose(x, routing, experts)


def without_gradient(x, routing, experts):
    return compose(x.detach(), routing, experts)


def into_memory_that_was_never_written(x, routing, experts):
    y = compose(x, routing, experts)
    return y + 0 * torch.empty_like(y)


def into_the_tokens(x, routing, experts):
    y = compose(x, routing, experts)
    x.data.zero_()
    return y


def by_the_forward_of_experts(x, routing, experts):
    return routing.combine(experts.forward(routing.dispatch(x), routing.counts))


def raises(*call):
    raise RuntimeError("out of tiles")


SERVES, AGREES = "it_serves_a_call_or_says_why_not", "outputs_and_gradients_are_those_of_compose"
WRONG_BACKENDS = {
    "refuses all": (compose, lambda *call: "it is Sunday", {SERVES}),
    "gives no reason": (compose, lambda x, routing, experts: "" if len(x) == 7 else None, {SERVES}),
    "cannot tell": (compose, raises, {SERVES, AGREES, "hooks_on_experts_run"}),
    "other outputs": (compose_twice, never, {AGREES, "hooks_on_experts_run"}),
    "no gradient": (without_gradient, never, {AGREES}),
    "old memory": (into_memory_that_was_never_written, never, {AGREES, "hooks_on_experts_run"}),
    "overwrites": (into_the_tokens, never, {AGREES, "hooks_on_experts_run"}),
    "no hooks": (by_the_forward_of_experts, never, {"hooks_on_experts_run"}),
}


@pytest.fixture
def backends_of_this_test():
    before = list(order._ORDER)
    yield
    order._ORDER[:] = before


@pytest.mark.parametrize("name", WRONG_BACKENDS)
@pytest.mark.usefixtures("backends_of_this_test")
def test_a_backend_that_breaks_a_law_is_caught(name):
    run, refuse, laws = WRONG_BACKENDS[name]
    register_backend(name, Backend(run, refuse, chosen=lambda *call: False))
    assert broken(check_backend, backends.LAWS, name, dtypes=(torch.float32,)) == laws


def test_every_law_of_backends_can_fail_and_the_definition_breaks_none():
    assert set().union(*(laws for *_, laws in WRONG_BACKENDS.values())) == {law.__name__ for law in backends.LAWS}
    check_backend("compose", dtypes=(torch.float32,))
