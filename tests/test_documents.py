"""Documents in packed rows: found in everything that models are told of them, and routed as each is alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DataCollatorWithFlattening, Qwen3MoeConfig, Qwen3MoeForCausalLM

from masked_models import D, decoder, sparse, words
from moeify import Context, record
from moeify.context import extra_inputs
from moeify.documents import Packing, document_ids

IDS = torch.tensor([[0, 0, 0, 1, 1, 2], [3, 4, 4, 4, 4, 4]])
POSITION = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]])
SAME = IDS.unsqueeze(2) == IDS.unsqueeze(1)
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()
IMAGE = torch.tensor([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]])  # 4 patches between 2 words


def found(given, ids=IDS):
    return document_ids(Packing.of(given, tuple(ids.shape)).starts(ids.numel()), None)


@pytest.mark.parametrize(
    "given",
    [
        {"position_ids": POSITION},
        {"position_ids": POSITION + 2},
        {"position_ids": POSITION.expand(3, 2, 6)},
        {"seq_idx": IDS.int()},
        {"cu_seq_lens_q": torch.tensor([0, 3, 5, 6, 7, 12], dtype=torch.int32)},
        {"cu_seqlens": torch.tensor([0, 3, 5, 6, 7, 12])},
        {"grid_thw": torch.tensor([[1, 1, 3], [1, 2, 1], [1, 1, 1], [1, 1, 1], [5, 1, 1]])},
        {"attention_mask": IDS + 1},
        {"attention_mask": torch.cat([torch.full((2, 3), 9), IDS + 1], 1)},
        {"attention_mask": SAME.unsqueeze(1)},
        {"attention_mask": (SAME & CAUSAL).unsqueeze(1).expand(2, 4, 6, 6)},
        {"attention_mask": torch.zeros(2, 6, 6).masked_fill(~(SAME & CAUSAL & ~CAUSAL.tril(-2)), -torch.inf)},
        {"attention_mask": {"full_attention": (SAME & CAUSAL).unsqueeze(1), "sliding_attention": None}},
        {"attention_mask": create_block_mask(
            lambda b, h, q, k: (IDS[b, q] == IDS[b, k]) & (q >= k), 2, None, 6, 6, device="cpu"
        )},
        {"attention_mask": SAME.unsqueeze(1), "position_ids": torch.arange(6).unsqueeze(0)},
    ],
)  # fmt: skip
def test_all_that_tells_of_documents_is_read(given):
    assert torch.equal(found(given), IDS)


def test_positions_of_images_begin_no_document_and_what_follows_does():
    position = torch.cat([IMAGE, IMAGE[:, :2]], 1).unsqueeze(1)
    assert found({"position_ids": position}, torch.zeros(1, 8)).tolist() == [[0] * 6 + [1] * 2]


def test_a_hidden_token_in_the_middle_of_a_document_does_not_end_it():
    seen = CAUSAL.clone()
    seen[:, 2] = False
    assert found({"attention_mask": seen.expand(1, 1, 6, 6)}, IDS[:1]).tolist() == [[0] * 6]


@pytest.mark.parametrize(
    "given",
    [
        {"attention_mask": torch.ones(2, 6), "position_ids": None},
        {"attention_mask": torch.ones(2, 6, dtype=torch.long).tril()},
        {"attention_mask": torch.full((2, 6), 2.0)},
        {"position_ids": torch.zeros(2, 1, dtype=torch.long)},
        {"max_length_q": 3},
    ],
)
def test_a_mask_of_padding_and_a_single_token_tell_of_no_document(given):
    assert Packing.of(given, (2, 6) if "attention_mask" in given else (2, 1)) is None


@given(st.lists(st.lists(st.integers(-1, 2), min_size=4, max_size=4), min_size=1, max_size=3))
def test_rows_have_a_number_even_without_tokens_and_padding_begins_no_document(rows):
    """-1 is padding, and other numbers are documents, which change as they like."""
    told = torch.tensor(rows)
    ids = document_ids(told.diff(dim=1, prepend=told[:, :1]) != 0, told >= 0)
    number = 0
    for row, of_row in zip(rows, ids.tolist(), strict=True):
        before = None
        for n, (document, got) in enumerate(zip(row, of_row, strict=True)):
            new = before is not None and document >= 0 and document != row[n - 1]
            number += new
            assert got == number
            before = document if document >= 0 else before
        number += 1


# Models

LENGTHS = (4, 1, 3)


@pytest.fixture
def llama():
    """A decoder that routes each sequence as a whole, which mixes documents unless it knows them."""
    return decoder(per="sequence")[0]


def documents():
    return [words(length) for length in LENGTHS]


def test_a_model_with_a_block_diagonal_mask_gives_documents_the_logits_they_have_alone(llama):
    llama.set_attn_implementation("eager")
    texts, ids = documents(), torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
    seen = (ids.unsqueeze(1) == ids) & torch.ones(8, 8).tril().bool()
    added = torch.zeros(1, 1, 8, 8).masked_fill(~seen, torch.finfo(torch.float32).min)
    position = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    for told in ({"attention_mask": added, "position_ids": position}, {"attention_mask": added}):
        packed = llama(torch.cat(texts).unsqueeze(0), **told).logits[0]
        if "position_ids" in told:  # rotary positions are relative, so it makes no difference to the model
            first = packed
        torch.testing.assert_close(packed, first, rtol=1e-4, atol=1e-4)
    for text, logits in zip(texts, first.split(LENGTHS), strict=True):
        torch.testing.assert_close(logits, llama(text.unsqueeze(0)).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}])
def test_what_the_flattening_collator_packs_has_the_logits_it_has_alone(llama, options):
    texts = documents()
    batch = DataCollatorWithFlattening(**options)([{"input_ids": text.tolist()} for text in texts])
    packed = llama(**batch, use_cache=False).logits[0]
    for text, logits in zip(texts, packed.split(LENGTHS), strict=True):
        torch.testing.assert_close(logits, llama(text.unsqueeze(0)).logits[0], rtol=1e-4, atol=1e-4)


def test_a_mask_that_numbers_documents_is_read_as_documents_and_padding():
    llama, moe = decoder(per="sequence")
    mask = torch.tensor([[1, 1, 2, 2, 0], [0, 1, 2, 2, 3]])
    with record(llama) as decisions:
        llama(words(2, 5), attention_mask=mask, use_cache=False)
    decision = next(iter(decisions.values()))
    assert decision.sequence_id.tolist() == [0, 1, 2, 3, 4]  # decided once per document
    assert int(decision.counts.sum()) == 8 * moe.router.k


def test_blocks_of_transformers_are_recorded_with_their_documents():
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=D, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model, batch = Qwen3MoeForCausalLM(config), {"input_ids": words(1, 8), "position_ids": torch.arange(8)[None] % 5}
    with record(model) as decisions:
        model(**batch)
    assert next(iter(decisions.values())).sequence_id.tolist() == [0] * 5 + [1] * 3


def test_documents_of_which_no_forward_knows_are_told_by_extra_inputs(llama):
    with extra_inputs(llama, seq_idx=IDS), record(llama) as decisions:
        llama(words(2, 6))
    assert next(iter(decisions.values())).sequence_id.tolist() == [0, 1, 2, 3, 4]


class Pooled(nn.Module):
    """A stack whose layers have half as many tokens as it is given."""

    def __init__(self):
        super().__init__()
        self.moe = sparse(Context(), per="sequence")

    def forward(self, inputs_embeds, position_ids=None):
        return self.moe(inputs_embeds[:, ::2])


def test_packed_rows_whose_layers_have_other_tokens_are_refused():
    model, x = Pooled(), torch.randn(2, 6, D)
    model.moe.context.watch([model])
    assert model(x, position_ids=torch.arange(6).expand(2, 6)).shape == (2, 3, D)
    with pytest.raises(
        ValueError, match=r"position_ids pack several documents into rows of \(2, 6\).* \(2, 3\) tokens"
    ):
        model(x, position_ids=POSITION)


def test_a_stack_that_is_called_by_itself_forgets_the_documents_of_its_last_call():
    model, stack, x = nn.Module(), nn.Module(), torch.randn(2, 6, D)
    context, seen = Context(), []
    stack.forward = lambda *args, **kwargs: seen.append(context.documents((2, 6)))
    context.watch([model, stack])
    stack(inputs_embeds=x, position_ids=POSITION)
    stack(inputs_embeds=x)
    assert torch.equal(seen[0], IDS.flatten())
    assert seen[1] is None
    stack(inputs_embeds=x, position_ids=POSITION)
    assert context.documents((2, 6)) is None


def test_sequences_first_are_laid_out_as_the_layer_lays_them_out():
    context = Context(batch_first=False)
    context.call.batch_first = False
    context.call.packing = Packing({"seq_idx": IDS}, (2, 6))
    assert torch.equal(context.sequence_ids((6, 2)), IDS.T.flatten())
