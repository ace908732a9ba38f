"""Engram against its formula, one token, table and tap at a time, in fp64, and against the layer of Qwen4-Exp."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from moeify import Context, MoE, Recipe, load, save, sparsify
from moeify.engram import Engram
from moeify.experts import FFN
from moeify.export.model_spec import Unsupported
from moeify.export.read import spec_of
from moeify.find import sub_tokens
from moeify.flops import count
from moeify.routers import TopK
from moeify.sparsify import copies, engram, fresh
from strategies import agree, doubled

B, N, D = 2, 7, 6
TINY = {"rows": 11, "dimensions": 4, "ngrams": 3, "heads": 2, "kernel": 3}


def filled(memory: Engram) -> Engram:
    for parameter in memory.parameters():
        nn.init.normal_(parameter)
    return memory


def called(ids: torch.Tensor, **inputs: torch.Tensor) -> Context:
    context = Context()
    context.call.inputs |= {"input_ids": ids} | inputs
    return context


def slow_places(ids: list[int], memory: Engram) -> list[list[int]]:
    """By Python's integers, which do not overflow."""
    m, sizes, starts = (buffer.tolist() for buffer in (memory.multipliers, memory.sizes, memory.starts))
    found = []
    for t in range(len(ids)):
        last = [ids[t - j] if t >= j else memory.pad for j in range(memory.ngrams)]
        row = []
        for n in range(2, memory.ngrams + 1):
            z = 0
            for j in range(n):
                z ^= last[j] * m[j]
            row += [z] * memory.heads
        found.append([start + z % size for start, z, size in zip(starts, row, sizes, strict=True)])
    return found


def norm(v, weight, eps=1e-5):
    return v / torch.sqrt((v * v).mean() + eps) * weight


def test_the_memory_is_its_formula():
    memory = filled(Engram(D, **TINY)).double()  # the root is steep near 0, where fp32 loses its digits
    ids, x = torch.randint(1, 1000, (B, N)), torch.randn(B, N, D, dtype=torch.float64, requires_grad=True)
    p, x64 = doubled(memory), x.detach().clone().requires_grad_()
    slow = []
    for sequence, states in zip(ids.tolist(), x64, strict=True):
        values = []
        for places, token in zip(slow_places(sequence, memory), states, strict=True):
            e = torch.cat([p["table"][place] for place in places])
            key, query = norm(p["keys.weight"] @ e, p["norm_key.weight"]), norm(token, p["norm_query.weight"])
            s = key @ query / math.sqrt(D)
            values.append(torch.sigmoid(torch.sign(s) * torch.sqrt(torch.abs(s))) * (p["values.weight"] @ e))
        normed = [norm(v, p["norm_value.weight"]) for v in values]
        for t, v in enumerate(values):
            taps = [p["conv"][2 - j] * normed[t - 3 * j] for j in range(3) if t >= 3 * j]
            slow.append(v + nn.functional.silu(sum(taps)))
    y = memory(x, called(ids))
    agree(y.flatten(0, 1), [x, *memory.parameters()], torch.stack(slow), [x64, *p.values()], rtol=1e-9, atol=1e-9)


def test_hashes_do_not_overflow_and_tables_have_different_primes():
    memory = Engram(D, **TINY | {"rows": 1000})
    assert memory.sizes.tolist() == [1009, 1013, 1019, 1021]
    ids = torch.tensor([[2**18 - 1, 5, 2**18 - 1, 2**18 - 1, 0]])
    assert memory.places(ids, torch.zeros_like(ids)).tolist() == [slow_places(ids[0].tolist(), memory)]


def test_a_token_reads_its_own_past_only():
    memory, ids, x = filled(Engram(D, **TINY)), torch.randint(1, 50, (1, N)), torch.randn(1, N, D)
    y = memory(x, called(ids))
    later = ids.clone()
    later[0, 4:] += 7
    assert torch.equal(memory(x, called(later))[:, :4], y[:, :4])
    alone = memory(x[:, 3:], called(ids[:, 3:]))
    assert not torch.allclose(y[:, 3:], alone)
    packed = memory.recall(x, ids, torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
    torch.testing.assert_close(packed[:, 3:], alone)


def test_packed_documents_do_not_see_each_other():
    model = filled_model()
    ids = torch.randint(1, 64, (1, 7))
    with torch.no_grad():
        packed = model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), use_cache=False).logits
        torch.testing.assert_close(packed[:, 3:], model(ids[:, 3:]).logits, atol=1e-5, rtol=1e-4)


def test_padding_on_the_left_changes_nothing():
    memory, ids, x = filled(Engram(D, **TINY)), torch.randint(1, 50, (1, 4)), torch.randn(1, 4, D)
    y = memory(x, called(ids))
    padded = called(torch.cat([torch.full((1, 3), 9), ids], 1))
    padded.mask(torch.arange(7).view(1, 7) >= 3)
    torch.testing.assert_close(memory(torch.cat([torch.randn(1, 3, D), x], 1), padded)[:, 3:], y)


def test_it_is_the_memory_of_qwen4_exp():
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen4_exp_text", hidden_size=D, ple_embed_dim=8, ngram_size=3, heads_per_ngram=2, vocab_size=50,
        ngram_vocab_size_base=11, ple_conv_kernel_size=3, split_ngram_parts=1, eos_token_id=0, rms_norm_eps=1e-5,
    )  # fmt: skip
    config.hc_count = 1  # the residual streams of hyper-connections, each with keys and a convolution of its own
    theirs = Qwen4ExpTextPLELayer(config, 0, 0)
    memory = filled(Engram(D, **TINY))
    hashed = theirs.ple_embedding
    memory.multipliers.copy_(hashed.layer_multipliers)
    assert memory.sizes.tolist() == hashed.head_vocab_sizes
    tensors = {
        hashed.ngram_embedding.weight: lambda: nn.functional.pad(
            memory.table, (0, 0, 0, len(hashed.ngram_embedding.weight) - len(memory.table))
        ),
        theirs.key_proj.weight: lambda: memory.keys.weight,
        theirs.value_proj.weight: lambda: memory.values.weight,
        theirs.conv1d.weight: lambda: memory.conv.t().unsqueeze(1),
    }
    with torch.no_grad():
        for other, mine in tensors.items():
            other.copy_(mine())
        for name in ("key", "query"):
            getattr(memory, f"norm_{name}").weight.copy_(norm_weight(getattr(theirs, f"norm_{name}")))
        memory.norm_value.weight.copy_(norm_weight(theirs.norm_conv))
    ids = torch.randint(1, 50, (B, N))
    results = []
    for call in (lambda x: memory(x, called(ids)), lambda x: theirs(x, ids, None)):
        x = torch.randn(B, N, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = call(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    grads = [
        (memory.table.grad, hashed.ngram_embedding.weight.grad[: len(memory.table)]),
        (memory.keys.weight.grad, theirs.key_proj.weight.grad),
        (memory.values.weight.grad, theirs.value_proj.weight.grad),
        (memory.conv.grad, theirs.conv1d.weight.grad.squeeze(1).t()),
    ]
    for mine, other in [*zip(*results, strict=True), *grads]:
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def norm_weight(module: nn.Module) -> torch.Tensor:
    """What a norm of theirs multiplies by: its output for ones, which it leaves as they are."""
    return module(torch.ones(1, D)).flatten() * math.sqrt(1 + 1e-5)


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=32, **sizes))


RECIPE = Recipe(num_experts=2, experts=copies, memory=partial(engram, rows=11))


def filled_model() -> LlamaForCausalLM:
    model = sparsify(llama().eval(), RECIPE, verbose=False)
    for layer in model.model.layers:
        filled(layer.mlp.memory)
    return model


def test_a_model_starts_as_it_was_learns_and_is_loaded(tmp_path):
    model = llama().eval()
    ids = torch.randint(64, (2, 9))
    with torch.no_grad():
        before = model(ids).logits
    sparsify(model, RECIPE, verbose=False)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)
    model(ids).logits.square().sum().backward()
    memory = model.model.layers[0].mlp.memory
    assert memory.values.weight.grad.any()
    filled(memory)
    save(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path, llama()).eval()(ids).logits, model(ids).logits)
        y = model(ids).logits
        masked = model(ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(masked, y)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False).shape == (2, 12)
    with pytest.raises(ValueError, match="called without 'input_ids'"):
        model(inputs_embeds=torch.randn(1, 4, 16))


def test_an_image_model_has_no_ids_to_look_up():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8, "patch_size": 4}
    model = ViTForImageClassification(ViTConfig(num_hidden_layers=1, **sizes))
    with pytest.raises(ValueError, match="images have none"):
        sparsify(model, RECIPE, verbose=False)
    assert not any(isinstance(part, MoE) for part in model.modules())


def test_sub_tokens_and_other_programs_have_no_memory():
    cut = Recipe(where=sub_tokens(2), experts=fresh, memory=partial(engram, rows=11))
    with pytest.raises(ValueError, match="looks up the ids of whole tokens"):
        sparsify(llama(), cut, verbose=False)
    with pytest.raises(Unsupported, match="a memory of n-grams"):
        spec_of(filled_model())


def test_lookups_cost_nothing_and_a_row_of_each_table_is_active():
    memory = Engram(D, **TINY)
    with_memory = count(MoE(TopK(D, 4), FFN(4, D, 5), memory=memory))
    without = count(MoE(TopK(D, 4), FFN(4, D, 5)))
    assert with_memory.flops - without.flops == 2 * 2 * D * 8
    dense = sum(p.numel() for name, p in memory.named_parameters() if name != "table")
    assert with_memory.active_parameters - without.active_parameters == dense + memory.tables * 2


@pytest.mark.parametrize("options", [{"heads": 3}, {"ngrams": 1}, {"heads": 0}])
def test_tables_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match="choose heads that divide"):
        Engram(D, **TINY | options)
