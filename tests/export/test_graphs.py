"""Sparse models as graphs: of `torch.export`, and in ONNX Runtime and OpenVINO where these are installed."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.export import Dim
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from moeify import MoE, Recipe, export, sparsify
from moeify.capacity import per_choice_by_4, per_token
from moeify.experts import FFN, Blocks, Constant, Identity, LoRA
from moeify.export.calls import Calls
from moeify.export.compatibility import tiny_model
from moeify.export.graph import check_program, traced
from moeify.export.model_spec import Unsupported
from moeify.routers import Capacity, ExpertChoice, MultiGate, Soft, TopK
from moeify.serve import serve_with
from moeify.sparsify import copies, fresh, recipes

TOP_2 = partial(TopK, k=2)


def language_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        use_cache=False,
    )
    return sparsify(LlamaForCausalLM(config), Recipe(router=TOP_2, num_experts=4), verbose=False).eval()


def image_model(router=TOP_2, experts=copies):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    return sparsify(
        ViTForImageClassification(config), Recipe(router=router, num_experts=4, experts=experts), verbose=False
    ).eval()


class Recommender(nn.Module):
    """Two tasks, each with a gate over the same experts (MMoE)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.moe = MoE(MultiGate(8, 4, gates=2), FFN(4, 8, 16))
        self.heads = nn.Linear(8, 1)

    def forward(self, features):
        return self.heads(self.moe(features)).squeeze(-1)


class Layer(nn.Module):
    """A sparse layer alone."""

    def __init__(self, router, experts):
        super().__init__()
        torch.manual_seed(0)
        self.moe = MoE(router(8, 4), experts())

    def forward(self, x, attention_mask=None):
        if attention_mask is not None:
            self.moe.context.mask(attention_mask.bool())
        return self.moe(x)


def capacity(width, experts, k=2, **options):
    return Capacity(TopK(width, experts, k=k, normalize=k > 1), eval_factor=0.5, **options)


def feed_forward():
    return FFN(4, 8, 16)


def of_several_types():
    return Blocks([FFN(2, 8, 16), Identity(), Constant(1, 8)])


def layer(router, padding=False, experts=feed_forward):
    first, second = ({"x": torch.randn(*size, 8)} for size in ((3, 10), (17, 7)))
    for inputs in (first, second) if padding else ():
        inputs["attention_mask"] = torch.ones(inputs["x"].shape[:2], dtype=torch.int64)
        inputs["attention_mask"][0, 2:5] = 0
    return partial(Layer, router, experts), first, second, {0: Dim.AUTO, 1: Dim.AUTO}


def of_recipe(name):
    torch.manual_seed(0)
    few = replace(recipes[name], num_experts=64 if name == "peer" else 4)
    model = tiny_model(few, "llama", layers=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def texts(batch, length, padding):
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, :padding] = 0
    return {"input_ids": torch.randint(64, (batch, length)), "attention_mask": mask}


CASES = {
    "text": (language_model, texts(2, 12, 5), texts(3, 9, 1), {0: Dim("b", max=64), 1: Dim("n", max=256)}),
    "image": (image_model, {"pixel_values": torch.randn(2, 3, 8, 8)}, {"pixel_values": torch.randn(5, 3, 8, 8)},
              {0: Dim("b", max=64)}),
    "soft": (partial(image_model, partial(Soft, slots=2), fresh), {"pixel_values": torch.randn(2, 3, 8, 8)},
             {"pixel_values": torch.randn(5, 3, 8, 8)}, {0: Dim("b", max=64)}),
    "capacity": layer(partial(capacity, k=1, capacity=per_token)),
    "capacity of groups": layer(partial(capacity, capacity=per_choice_by_4, priority="batch", per=8)),
    "capacity of texts": layer(partial(capacity, per="prefix"), padding=True),
    "expert choice": layer(ExpertChoice),
    "expert choice of a part of a token": layer(partial(ExpertChoice, factor=1.5)),
    "experts of several types": layer(TOP_2, experts=of_several_types),
    "tasks": (Recommender, {"features": torch.randn(6, 8)}, {"features": torch.randn(9, 8)}, {0: Dim("b", max=64)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_program_of_ordinary_operators_serves_every_batch_length_and_padding(case):
    make, first, second, sizes = CASES[case]
    model = make()
    with torch.no_grad():
        program = torch.export.export(model, (), first, dynamic_shapes=dict.fromkeys(first, sizes), strict=False)
        for inputs in (first, second):
            real = inputs["attention_mask"].bool() if "attention_mask" in inputs else ...
            found, expected = (
                getattr(out, "logits", out)[real] for out in (program.module()(**inputs), model(**inputs))
            )
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not [node.target for node in program.graph.nodes if "moeify" in str(node.target)]


@pytest.mark.parametrize("to", ["onnx", "openvino"])
@pytest.mark.parametrize("case", CASES)
def test_another_program_computes_the_graph(case, to, tmp_path):
    pytest.importorskip({"onnx": "onnxruntime"}.get(to, to))
    make, first, _, _ = CASES[case]
    exporters = {"onnx": export.OnnxFolder, "openvino": export.OpenVinoFolder}
    done = export.write(make(), tmp_path / "out", to, exporter=exporters[to](first))
    assert done.verification.difference < 1e-4
    assert export.verify(tmp_path / "out").difference == done.verification.difference


@pytest.mark.parametrize("to", ["onnx", "openvino"])
@pytest.mark.parametrize("recipe", ["arrow", "engram", "loramoe", "mhmoe", "mobile_vmoe", "peer", "soft"])
def test_another_program_computes_adapters_memories_sub_tokens_and_what_reads_whole_texts(recipe, to, tmp_path):
    pytest.importorskip({"onnx": "onnxruntime"}.get(to, to))
    if (recipe, to) == ("engram", "openvino"):
        pytest.skip("its hashes are refused")
    assert export.write(of_recipe(recipe), tmp_path / "out", to).verification.difference < 1e-4


def test_hashes_of_64_bits_are_refused_for_openvino_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("moeify.export.graph._program", lambda *call: None)
    model = of_recipe("engram")
    reasons = export.supports(model)
    assert reasons["onnx"] is None
    with pytest.raises(ValueError, match=r"memory of n-grams \(model.layers.0.mlp.memory\) hashes with 64-bit"):
        export.write(model, tmp_path / "out", "openvino")
    assert not list(tmp_path.iterdir())


def test_a_graph_holds_what_arrow_computes_from_weights():
    model = of_recipe("arrow")
    program = export.OnnxFolder().match(model)
    assert not [node for node in program.graph.nodes if "linalg" in str(node.target)]
    router = model.model.layers[0].self_attn.q_proj.router
    before = router.prototypes
    assert router.constant is None
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.experts.lora_A.copy_(torch.randn_like(before).unsqueeze(1))
    assert not torch.equal(router.prototypes, before)


def test_the_mask_of_features_is_as_long_as_these():
    make, first, _, _ = CASES["capacity of texts"]
    _, second = Calls.of(make(), first).inputs
    assert second["attention_mask"].shape == second["x"].shape[:2] == (4, 10)


def test_a_capacity_that_moves_rows_is_refused_until_it_is_off(tmp_path):
    model = Layer(partial(capacity, overflow="next"), feed_forward)
    exporter = export.OnnxFolder(torch.randn(3, 10, 8))
    with pytest.raises(ValueError, match=r"offers rows that were dropped to other experts.*serve_with"):
        export.write(model, tmp_path / "out", "onnx", exporter=exporter)
    assert not list(tmp_path.iterdir())
    serve_with(model, capacity=math.inf)
    assert exporter.supports(model) is None


def test_a_size_computed_from_values_is_refused_by_the_name_of_its_module(tmp_path):
    class Counting(TopK):
        def forward(self, x, context):
            return super().forward(x[: int((x > 0).sum()) or 1], context)

    model = nn.Sequential(MoE(Counting(8, 4, k=2), FFN(4, 8, 16)))
    reason = export.OnnxFolder(torch.randn(6, 8)).supports(model)
    assert reason == "0.router (Counting) computes sizes from the values of its input, which a graph cannot"


def test_a_batch_that_a_step_fixes_is_refused():
    class Fixed(TopK):
        def forward(self, x, context):
            return super().forward(x + x.shape[:-1].numel(), context)

    with pytest.raises(Unsupported, match="a step of it fixes the first size of x to 3"):
        check_program(Layer(Fixed, feed_forward), torch.randn(3, 10, 8))


def test_a_memory_of_n_grams_has_a_program_for_every_batch():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, use_cache=False
    )
    model = sparsify(LlamaForCausalLM(config), replace(recipes["engram"], num_experts=4), verbose=False).eval()
    assert check_program(model).difference < 1e-5


@pytest.mark.parametrize("base", ["image", "text"])
@pytest.mark.parametrize("recipe", ["mhmoe", "mobile_vmoe", "moepp", "mole", "soft", "zaya"])
def test_what_is_decided_per_image_or_by_the_layer_before_has_a_program_for_every_batch(recipe, base):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if base == "image":
        dense = ViTForImageClassification(ViTConfig(**small, image_size=8, patch_size=4))
    else:
        dense = LlamaForCausalLM(LlamaConfig(**small, vocab_size=64))
    model = sparsify(dense, recipes[recipe], verbose=False, allow_noncausal=True).eval()
    assert check_program(model).difference < 1e-5


@pytest.mark.parametrize(
    ("experts", "gathers"),
    [(partial(LoRA, 64, 8, rank=4), 0), (partial(FFN, 64, 8, 1), 0), (partial(FFN, 4, 8, 16), 4)],
)
def test_a_graph_gathers_the_rows_of_an_expert_once_and_not_of_adapters_or_single_units(experts, gathers):
    torch.manual_seed(0)
    model = MoE(TopK(8, experts().num_experts, k=2), experts()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(6, 8)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: Dim.AUTO}}, strict=False)
        for rows in (x, torch.randn(9, 8)):
            torch.testing.assert_close(program.module()(rows), model(rows), rtol=1e-5, atol=1e-4)
    assert len(program.graph.find_nodes(op="call_function", target=torch.ops.aten.nonzero.default)) == gathers


def test_a_row_of_padding_alone_leaves_the_others_as_they_are():
    torch.manual_seed(0)
    model = Layer(partial(Soft, slots=2), feed_forward).eval()
    x, mask = torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.int64)
    mask[0, 3:] = 0
    with torch.no_grad():
        program = torch.export.export(
            model, (x, mask), dynamic_shapes=[{0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO, 1: Dim.AUTO}], strict=False
        )
        mask[1] = 0
        found, expected = program.module()(x, mask), model(x, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


def test_a_probe_of_one_text_gives_a_graph_for_any_number():
    assert check_program(Layer(TopK, feed_forward), torch.randn(1, 10, 8)).difference < 1e-5


@pytest.mark.parametrize(
    "said",
    [
        "Check 'false' failed\nSummary:\n-- No conversion rule found for operations: aten.linalg_qr.default",
        "No ONNX function found for <OpOverload(op='aten.linalg_qr', overload='default')>. Failure message: none",
    ],
)
def test_an_operator_that_the_program_lacks_is_named(said):
    def trace(*call):
        raise RuntimeError("Failed to convert, step 3/3") from ValueError(said)

    with pytest.raises(Unsupported, match=r"^it computes with aten.linalg_qr, for which the program has no operator$"):
        traced(nn.Linear(1, 1), {}, trace)


def test_the_first_cause_of_an_error_is_the_reason():
    def trace(*call):
        raise RuntimeError("Failed to convert, step 3/3") from ValueError("no such thing")

    with pytest.raises(Unsupported, match=r"serves every input: no such thing$"):
        traced(nn.Linear(1, 1), {}, trace)
