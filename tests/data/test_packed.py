"""Packed rows are full, count positions from 0 in every document, and keep documents apart through a whole model."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moeify import Recipe, sparsify
from moeify.data import ByteTokenizer, Packed, packed
from moeify.sparsify import engram, fresh


def test_documents_fill_rows_and_go_on_in_the_next_one():
    rows = packed(["abc", "", "defgh"], ByteTokenizer(), 4)  # abc$ | $def | (gh$ is no full row)
    assert len(rows) == 2
    assert rows[0]["input_ids"].tolist() == [97, 98, 99, 256]
    assert rows[0]["position_ids"].tolist() == [0, 1, 2, 3]
    assert rows[0]["labels"].tolist() == [-100, 98, 99, 256]
    assert rows[1]["input_ids"].tolist() == [256, 100, 101, 102]
    assert rows[1]["position_ids"].tolist() == [0, 0, 1, 2]
    assert rows[1]["labels"].tolist() == [-100, -100, 101, 102]
    cut = Packed([torch.arange(7)], 3)
    assert [row["position_ids"].tolist() for row in cut] == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize(("length", "why"), [(9, "have 8 tokens, too few"), (1, "choose a length of 2")])
def test_rows_that_cannot_be_filled_are_refused(length, why):
    with pytest.raises(ValueError, match=why):
        packed(["abc", "def"], ByteTokenizer(), length)


def test_a_text_alone_is_not_taken_for_the_documents_of_its_letters():
    with pytest.raises(TypeError, match="put it into a list"):
        packed("abcdef", ByteTokenizer(), 3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_document_of_a_row_sees_another(attention):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=258, num_key_value_heads=2, attn_implementation=attention, **sizes)
    recipe = Recipe(num_experts=4, experts=fresh, memory=partial(engram, rows=101))
    model = sparsify(LlamaForCausalLM(config), recipe, verbose=False).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.memory.values.weight)
    texts = ["What is it?", "A text of some length.", "The end."]
    row = packed(texts, ByteTokenizer(), sum(map(len, texts)) + 3)[0]
    place = torch.tensor([0, 12, 35, 44]).tolist()

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(ids[None], position_ids=row["position_ids"][None], use_cache=False).logits[0]

    before = logits(row["input_ids"])
    for changed in range(3):
        ids = row["input_ids"].clone()
        ids[place[changed] : place[changed + 1]] = torch.randint(256, (place[changed + 1] - place[changed],))
        after = logits(ids)
        for other in range(3):
            own = slice(place[other], place[other + 1])
            assert torch.allclose(after[own], before[own], atol=1e-5) == (other != changed)
    for first, last in pairwise(place):
        with torch.no_grad():
            alone = model(row["input_ids"][None, first:last], use_cache=False).logits[0]
        torch.testing.assert_close(before[first:last], alone, atol=1e-5, rtol=1e-4)
