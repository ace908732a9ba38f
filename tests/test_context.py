"""What a layer deep inside learns of the call of its model."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from masked_models import LEFT, RIGHT, VOCABULARY, D, decoder, real, sparse, watched_tokens, words
from moeify import Context
from strategies import layer

# Decoders


@pytest.fixture
def llama():
    return decoder()


@pytest.mark.parametrize("mask", [LEFT, RIGHT])
def test_a_decoder_routes_no_padding(llama, mask):
    model, moe = llama
    seen = watched_tokens(moe)
    model(words(2, 5), attention_mask=mask)
    assert seen == [real(mask)]


def test_a_mask_that_is_added_to_scores_is_read_as_one():
    module, context = Masked(), Context()
    context.watch([module])
    seen = []
    module.register_forward_pre_hook(lambda *args: seen.extend(context.call.positions.tolist()))
    module(torch.ones(2, 5, dtype=torch.long), attention_mask=(1.0 - LEFT.float()) * -10_000.0)
    assert seen == real(LEFT)


class Masked(nn.Module):
    def forward(self, input_ids, attention_mask=None):
        return input_ids


def test_embeddings_count_like_words(llama):
    model, moe = llama
    seen = watched_tokens(moe)
    model(inputs_embeds=torch.randn(2, 5, D), attention_mask=LEFT)
    assert seen == [real(LEFT)]


def test_a_call_without_a_mask_forgets_the_last_one(llama):
    model, moe = llama
    seen = watched_tokens(moe)
    model(words(2, 5), attention_mask=LEFT)
    model(words(3, 4))
    assert seen[1] == list(range(12))


@pytest.mark.parametrize("mask", [LEFT, RIGHT])
def test_a_padded_sequence_gets_the_logits_it_gets_alone(llama, mask):
    model, _ = llama
    ids = words(2, 5)
    padded = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    for b in range(2):
        alone = model(ids[b : b + 1, mask[b].bool()]).logits[0]
        torch.testing.assert_close(padded[b, mask[b].bool()], alone, rtol=1e-4, atol=1e-4)


def test_generation_routes_the_prompt_once_and_then_one_token_per_sequence(llama):
    model, moe = llama
    seen = watched_tokens(moe)
    model.generate(words(2, 5), attention_mask=LEFT, max_new_tokens=4, do_sample=False)
    assert seen == [real(LEFT), [0, 1], [0, 1], [0, 1]]


def test_generation_with_a_cache_is_generation_without(llama):
    model, _ = llama
    ids = words(2, 5)
    with_cache, without = (
        model.generate(ids, attention_mask=LEFT, max_new_tokens=4, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_a_deep_copy_listens_to_its_own_calls(llama):
    model, moe = llama
    twin = copy.deepcopy(model)
    twin_moe = twin.model.layers[0].mlp
    assert twin_moe.context is not moe.context
    seen, twin_seen = watched_tokens(moe), watched_tokens(twin_moe)
    twin(words(2, 5), attention_mask=LEFT)
    model(words(2, 5), attention_mask=RIGHT)
    assert (twin_seen, seen) == ([real(LEFT)], [real(RIGHT)])


def test_handles_stop_the_listening(llama):
    model, moe = llama
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    handles = moe.context.watch([model])
    for handle in handles:
        handle.remove()
    model(words(2, 5), attention_mask=LEFT)
    assert moe.context.call.positions is None


def test_inputs_are_kept_by_name(llama):
    model, moe = llama
    ids = words(2, 5)
    seen = []
    moe.register_forward_pre_hook(lambda *args: seen.append(moe.context.look_up("input_ids")))
    model(ids, attention_mask=LEFT)
    assert torch.equal(seen[0], ids)


# Encoders and decoders


@pytest.fixture
def t5():
    """An encoder-decoder, its sparse layer in the encoder, and the one in the decoder."""
    config = T5Config(
        vocab_size=VOCABULARY, d_model=D, d_ff=8, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    layers = []
    for stack in (model.encoder, model.decoder):
        context = Context()
        feed_forward = stack.block[0].layer[-1]
        feed_forward.DenseReluDense = sparse(context)
        context.watch([model, stack])
        layers.append(feed_forward.DenseReluDense)
    return model, *layers


def test_encoder_and_decoder_have_masks_of_their_own(t5):
    model, encoder, decoder = t5
    read, written = watched_tokens(encoder), watched_tokens(decoder)
    answer = torch.tensor([[1, 1, 1], [1, 0, 0]])
    model(words(2, 5), attention_mask=RIGHT, decoder_input_ids=words(2, 3), decoder_attention_mask=answer)
    assert (read, written) == ([real(RIGHT)], [real(answer)])


@pytest.mark.parametrize("length", [3, 5])
def test_a_decoder_without_a_mask_routes_every_token(t5, length):
    model, encoder, decoder = t5
    read, written = watched_tokens(encoder), watched_tokens(decoder)
    model(words(2, 5), attention_mask=RIGHT, decoder_input_ids=words(2, length))
    assert (read, written) == ([real(RIGHT)], [list(range(2 * length))])


def test_an_encoder_decoder_generates(t5):
    model, encoder, decoder = t5
    read, written = watched_tokens(encoder), watched_tokens(decoder)
    model.generate(words(2, 5), attention_mask=RIGHT, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert read == [real(RIGHT)]
    assert written == [[0, 1]] * 3


def test_an_encoder_called_by_itself_is_heard(t5):
    model, encoder, _ = t5
    read = watched_tokens(encoder)
    model.encoder(words(2, 5), attention_mask=RIGHT)
    model.encoder(words(3, 4))
    assert read == [real(RIGHT), list(range(12))]


def test_bert_routes_no_padding():
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=D, intermediate_size=24, num_hidden_layers=1,
                        num_attention_heads=2)  # fmt: skip
    model = BertModel(config).eval()
    context = Context()
    moe = model.encoder.layer[0].intermediate.dense = sparse(context, width_out=24)
    context.watch([model])
    seen = watched_tokens(moe)
    model(words(2, 5), RIGHT)
    assert seen == [real(RIGHT)]


# torch's own transformer


def torch_encoder(batch_first: bool, **options):
    block = nn.TransformerEncoderLayer(D, 2, dim_feedforward=24, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(block, 1, enable_nested_tensor=False)
    context = Context()
    moe = model.layers[0].linear1 = sparse(context, width_out=24, **options)
    context.watch([model])
    return model, moe


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_padding_of_torchs_encoder_is_true_where_a_token_is_not_real(batch_first):
    model, moe = torch_encoder(batch_first)
    seen = watched_tokens(moe)
    x = torch.randn(2, 5, D)
    model(x if batch_first else x.transpose(0, 1), src_key_padding_mask=~RIGHT.bool())
    assert seen == [real(RIGHT if batch_first else RIGHT.T)]


def test_the_order_of_axes_changes_no_decision_per_group():
    first, moe = torch_encoder(True, per="sequence")
    last, _ = torch_encoder(False, per="sequence")
    last.load_state_dict(first.state_dict())
    x = torch.randn(2, 5, D)
    hiding = ~RIGHT.bool()
    y = first(x, src_key_padding_mask=hiding)
    z = last(x.transpose(0, 1), src_key_padding_mask=hiding).transpose(0, 1)
    torch.testing.assert_close(y[RIGHT.bool()], z[RIGHT.bool()])
    assert moe.context.call.batch_first


def test_torchs_transformer_has_a_mask_for_each_of_its_stacks():
    model = nn.Transformer(D, 2, 1, 1, dim_feedforward=24, dropout=0.0, batch_first=True)
    seen = []
    for stack in (model.encoder, model.decoder):
        context = Context()
        moe = stack.layers[0].linear1 = sparse(context, width_out=24)
        context.watch([model, stack])
        seen.append(watched_tokens(moe))
    answer = torch.tensor([[1, 1, 1], [1, 0, 0]])
    hiding = {"src_key_padding_mask": ~RIGHT.bool(), "tgt_key_padding_mask": ~answer.bool()}
    model(torch.randn(2, 5, D), torch.randn(2, 3, D), **hiding)
    assert seen == [[real(RIGHT)], [real(answer)]]


def test_a_compiled_model_hears_every_mask():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, D)
            self.moe = sparse(Context())

        def forward(self, input_ids, attention_mask=None):
            return self.moe(self.embed(input_ids))

    torch._dynamo.reset()
    model, ids = Model(), words(2, 5)
    model.moe.context.watch([model])
    compiled = torch.compile(model, backend="eager")
    for mask in (LEFT, None, RIGHT, torch.ones(2, 5)):
        torch.testing.assert_close(compiled(ids, attention_mask=mask), model(ids, attention_mask=mask))


@pytest.mark.parametrize("mask_of_the_image", [None, torch.zeros(1, 1, 9, 9)])
def test_the_mask_of_the_words_is_not_that_of_the_image(mask_of_the_image):
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = sparse(Context())

        def forward(self, hidden_states, **options):
            return self.moe(hidden_states)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision = Vision()

        def forward(self, input_ids, pixel_values, attention_mask=None):
            options = {} if mask_of_the_image is None else {"attention_mask": mask_of_the_image}
            return self.vision(pixel_values, **options)

    model = Model()
    model.vision.moe.context.watch([model, model.vision])
    seen = watched_tokens(model.vision.moe)
    model(words(2, 5), torch.randn(9, D), attention_mask=LEFT)
    assert seen == [list(range(9))]


def test_a_stack_without_a_mask_of_its_own_shares_that_of_its_model():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = sparse(Context())

        def forward(self, hidden_states):
            return self.moe(hidden_states)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.stack = nn.Embedding(VOCABULARY, D), Stack()

        def forward(self, input_ids, attention_mask=None):
            return self.stack(self.embed(input_ids))

    model = Model()
    model.stack.moe.context.watch([model, model.stack])
    seen = watched_tokens(model.stack.moe)
    model(words(2, 5), attention_mask=LEFT)
    assert seen == [real(LEFT)]


# Groups


def test_every_sequence_is_a_group():
    assert Context().sequence_ids((2, 3)).tolist() == [0, 0, 0, 1, 1, 1]


def test_with_the_batch_last_the_columns_are_groups():
    context = Context()
    context.call.batch_first = False
    assert context.sequence_ids((3, 2)).tolist() == [0, 1, 0, 1, 0, 1]


def test_flattened_tokens_take_their_groups_from_the_models_input():
    context = Context()
    assert context.sequence_ids((6,)).tolist() == [0] * 6
    context.call.inputs = {"input_ids": torch.zeros(2, 3)}
    assert context.sequence_ids((6,)).tolist() == [0, 0, 0, 1, 1, 1]
    assert context.sequence_ids((5,)).tolist() == [0] * 5


def test_any_leading_axes_are_groups():
    assert Context().sequence_ids((2, 2, 2)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


# Bad inputs


def test_a_mask_that_hides_everything_is_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 3\) marks every token as padding"):
        Context().mask(torch.zeros(1, 3))


def test_a_mask_that_hides_nothing_costs_nothing():
    context = Context()
    context.mask(torch.ones(2, 3))
    assert context.call.token_mask is context.call.positions is None


def test_an_empty_batch_is_refused_by_the_model_that_was_called():
    model = nn.Sequential(layer())
    model[0].context.watch([model])
    with pytest.raises(ValueError, match=r"Sequential was called with an empty batch: input has shape \(0, 8\)"):
        model(torch.randn(0, 8))


def test_a_mask_of_another_call_is_refused_until_it_is_cleared():
    moe = layer()
    moe.context.mask(LEFT)
    with pytest.raises(ValueError, match=r"context\.clear\(\)"):
        moe(torch.randn(3, 8))
    moe.context.clear()
    assert moe(torch.randn(3, 8)).shape == (3, 8)
