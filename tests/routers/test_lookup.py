import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify import Context
from moeify.routers import Lookup
from moeify.routers.lookup import balanced_table
from strategies import seeds


def look_up(router, shape, mask=None, **inputs):
    context = Context()
    context.mask(mask)
    context.call.inputs.update(inputs)
    return router(torch.randn(*shape, 8), context)


@given(st.integers(1, 9), st.data(), seeds)
def test_every_key_has_k_different_experts_and_among_any_first_keys_all_are_equally_frequent(num_experts, data, seed):
    torch.manual_seed(seed)
    k, size = data.draw(st.integers(1, num_experts)), data.draw(st.integers(1, 60))
    table = balanced_table(size, num_experts, k)
    assert table.shape == (size, k)
    assert all(len(set(row)) == k for row in table.tolist())
    for n in (size, size // 2):
        for column in table[:n].T:
            counts = column.bincount(minlength=num_experts)
            assert counts.max() - counts.min() <= 1


def test_tables_differ_from_layer_to_layer_and_are_saved():
    first, second = Lookup(8, 4), Lookup(8, 4)
    assert not torch.equal(first.table, second.table)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.table, second.table)


def test_a_token_goes_where_its_id_goes_in_every_place():
    router = Lookup(8, 4, size=50)
    ids = torch.tensor([[3, 7, 3], [9, 3, 7]])
    index = look_up(router, (2, 3), input_ids=ids).choices.indices.flatten()
    assert torch.equal(index, router.table[ids.flatten(), 0])


def test_a_key_beyond_the_table_is_taken_modulo_its_size():
    router = Lookup(8, 4, size=5)
    ids = torch.tensor([[0, 4, 5, 12, 999999]])
    assert torch.equal(look_up(router, (1, 5), input_ids=ids).choices.indices, router.table[[0, 4, 0, 2, 4]])


def test_padding_is_not_looked_up():
    router = Lookup(8, 4, size=50)
    ids, mask = torch.tensor([[1, 2, 0], [3, 0, 0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    routing = look_up(router, (2, 3), mask, input_ids=ids)
    assert torch.equal(routing.choices.indices, router.table[[1, 2, 3]])
    assert routing.source.sort().values.tolist() == [0, 1, 3]


def test_a_task_sends_all_tokens_of_its_sequence_to_the_same_experts():
    router = Lookup(8, 4, key="task", size=3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    index = look_up(router, (2, 4), mask, task=torch.tensor([2, 1])).choices.indices
    assert torch.equal(index, router.table[[2, 2, 2, 1, 1]])


def test_a_modality_may_be_given_as_a_mask_and_the_layer_as_flat_tokens():
    router = Lookup(8, 2, key="is_image", size=2)
    is_image = torch.tensor([[True, True, False], [False, True, False]])
    index = look_up(router, (6,), is_image=is_image).choices.indices
    assert torch.equal(index, router.table[is_image.flatten().long()])


def test_generation_looks_up_the_new_token_alone():
    router = Lookup(8, 4, size=50)
    assert torch.equal(
        look_up(router, (2, 1), input_ids=torch.tensor([[3], [4]])).choices.indices, router.table[[3, 4]]
    )


def test_a_key_that_was_not_given_is_named_with_those_that_were():
    with pytest.raises(ValueError, match="without it; it was given: inputs_embeds"):
        look_up(Lookup(8, 4), (2, 3), inputs_embeds=torch.randn(2, 3, 8))


@pytest.mark.parametrize("shape", [(2, 4), (3, 2), (1,)])
def test_a_key_that_fits_neither_tokens_nor_sequences_is_refused(shape):
    with pytest.raises(ValueError, match="fits neither the tokens"):
        look_up(Lookup(8, 4, key="task"), (2, 3), task=torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 5}, "k=5 experts per token out of 4"),
        ({"k": 0}, "k=0 experts"),
        ({"size": 0}, "size=0 has no entry"),
        ({"learned": True}, "k=1 with normalised weights"),
    ],
)
def test_what_cannot_be_looked_up_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Lookup(8, 4, **options)
