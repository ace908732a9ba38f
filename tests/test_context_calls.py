"""Whose forward pass it is: threads, calls within calls and passes that fail keep their masks apart."""

import contextlib
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from masked_models import LEFT, RIGHT, decoder, real, watched_tokens, words
from moeify import Context, record
from moeify.context import extra_inputs, running
from moeify.sparsify import Recipe, sparsify
from strategies import layer
from tiny_models import causal_lm


@pytest.fixture
def llama():
    return decoder()


def test_threads_that_call_one_model_keep_their_masks_apart(llama):
    model, _ = llama
    masks = [LEFT, RIGHT, None, LEFT.flip(0)] * 8
    ids = words(2, 5)
    with torch.no_grad():
        alone = [model(ids, attention_mask=mask).logits for mask in masks]

        def run(mask):
            with torch.no_grad():
                return model(ids, attention_mask=mask).logits

        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(run, masks))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


def test_decisions_of_another_thread_are_recorded_only_where_this_one_does_not_call_the_model(llama):
    model, _ = llama

    def routed():
        return {int(decision.counts.sum()) for decision in decisions.values()}

    with torch.no_grad(), ThreadPoolExecutor(1) as other, record(model) as decisions:
        other.submit(model, words(1, 3)).result()
        (elsewhere,) = routed()
        model(words(2, 5))
        (here,) = routed()
        other.submit(model, words(1, 3)).result()
        assert routed() == {here}
        assert here * 3 == elsewhere * 10


def test_inputs_that_one_thread_adds_are_not_those_of_another():
    model = nn.Sequential(layer())
    with extra_inputs(model, task=[1]), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: model[0].context.extra_inputs).result() == {}
        assert model[0].context.extra_inputs["task"].tolist() == [1]


def test_a_model_that_is_called_while_it_runs_goes_on_with_its_own_mask(llama):
    model, moe = llama
    seen = watched_tokens(moe)
    inner = []

    def call_again(*args):
        if not inner:
            inner.append(True)
            model(words(2, 5), attention_mask=RIGHT)

    moe.register_forward_pre_hook(call_again)
    model(words(2, 5), attention_mask=LEFT)
    assert seen == [real(RIGHT), real(LEFT)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_no_mask_behind(llama, error):
    model, moe = llama

    def fail(*args):
        raise error

    handle = moe.register_forward_pre_hook(fail)
    for call in (model, model.model):
        with pytest.raises(error) as raised:  # whose traceback keeps the functions that were left
            call(words(2, 5), attention_mask=LEFT)
        assert moe.context.call.token_mask is None
        assert running() == []
        del raised
    handle.remove()
    seen = watched_tokens(moe)
    model(words(2, 5), attention_mask=RIGHT)
    moe(torch.randn(2, 5, moe.experts.width))
    assert seen == [real(RIGHT), list(range(10))]


def test_an_interrupt_of_a_call_within_a_call_leaves_the_outer_one(llama):
    model, moe = llama
    seen = watched_tokens(moe)
    inner = []

    def call_again(*args):
        inner.append(True)
        if len(inner) == 2:
            raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            model(words(2, 5), attention_mask=RIGHT)

    moe.register_forward_pre_hook(call_again)
    model(words(2, 5), attention_mask=LEFT)
    assert seen == [real(LEFT)]
    assert running() == []


@pytest.mark.parametrize("grad", [True, False])
def test_a_layer_called_alone_hears_nothing_of_a_call_before(grad):
    model = sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False)
    block = model.model.layers[0]
    hidden, every = torch.randn(2, 5, block.mlp.experts.width), list(range(10))
    where = {"position_embeddings": model.model.rotary_emb(hidden, torch.arange(5).unsqueeze(0))}
    calls = [
        lambda: model(words(2, 5), attention_mask=RIGHT),
        lambda: model.model(words(2, 5), attention_mask=RIGHT),
        lambda: model.model(words(2, 5), attention_mask=0 * RIGHT),
        lambda: block(hidden, attention_mask=RIGHT[:, None, None].bool(), **where),
    ]
    seen = watched_tokens(block.mlp)
    with torch.set_grad_enabled(grad):
        for call in calls:
            with contextlib.suppress(ValueError):  # of the one that is all padding
                call()
            block.mlp(hidden)
    assert seen == [real(RIGHT), every, real(RIGHT), every, every, real(RIGHT), every]
    assert running() == []


def test_a_context_can_be_pickled():
    context = Context()
    context.mask(LEFT)
    assert pickle.loads(pickle.dumps(context)).call.token_mask is None
