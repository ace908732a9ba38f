"""What `save` wrote opens in transformers: with moeify, without it, and again after transformers has saved it."""

import copy
import json
import os
import re
import subprocess
import sys
from functools import partial

import huggingface_hub
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

from moeify import Recipe, load, save, sparsify
from moeify.find import every
from moeify.origin import Origin
from moeify.routers import Compete, ExpertGroups, NoisyTopK, Soft, TopK, sigmoid
from moeify.sparsify import dense, fresh, frozen, gated, splits
from moeify.sparsify.after import sandwich
from tiny_models import DENSE, inputs, tokens, widened

COPIES = Recipe(num_experts=4)
AUTO = {
    "llama": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
    "bert": "AutoModelForMaskedLM",
    "vit": "AutoModelForImageClassification",
}
GROUPED = partial(TopK, score=sigmoid, selection_bias=True, expert_groups=ExpertGroups(2, 1, "top2"), scale=2.5)
PLAIN = {
    "groups": Recipe(num_experts=8, router=GROUPED, experts=fresh, shared=dense),
    "logits": Recipe(num_experts=4, router=partial(TopK, select="logit", selection_bias=True, bias=True)),
    "one": Recipe(num_experts=4, router=partial(TopK, k=1, normalize=False), experts=fresh, shared=frozen),
    "gated": Recipe(num_experts=4, experts=partial(fresh, granularity=2), shared=gated, where=every(2)),
    "parts": Recipe(num_experts=4, experts=splits, router=partial(TopK, normalize=False)),
    "noisy": Recipe(num_experts=4, router=partial(NoisyTopK, noise=0.25)),
    "compete": Recipe(num_experts=4, router=Compete),
}
NOT_PLAIN = {
    "router": Recipe(num_experts=4, router=partial(TopK, per="sequence")),
    "after": Recipe(num_experts=4, experts=fresh, after=sandwich),
    "soft": Recipe(num_experts=4, router=Soft, experts=fresh),
}


def saved(folder, family: str = "llama", recipe: Recipe = COPIES) -> nn.Module:
    """Save a sparse model whose experts differ from each other, and return it."""
    model = sparsify(DENSE[family](), recipe, verbose=False, allow_noncausal=True)
    model = widened(model).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("selection_bias"):
            buffer.copy_(torch.linspace(-0.3, 0.3, len(buffer)))
    save(model, folder)
    return model


@torch.no_grad()
def assert_same(one: nn.Module, other: nn.Module) -> None:
    x = inputs(one) if one.config.model_type != "moeify" else inputs(other)
    theirs = other(**x)
    for name, value in one(**x).items():
        if isinstance(value, torch.Tensor):
            assert (value - theirs[name]).abs().max() <= 1e-6 * value.abs().max(), name


def opened(folder, auto: str = "AutoModelForCausalLM", **options) -> nn.Module:
    model, report = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model


def standing_alone(folder, monkeypatch, tmp_path) -> nn.Module:
    """The model by the classes of the modelling file, as transformers opens it where there is no moeify."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((folder / "config.json").read_text())
    name = config["architectures"][0]
    monkeypatch.setattr(transformers, name, getattr(transformers, name, None), raising=False)
    model, report = get_class_from_dynamic_module(f"modeling_moeify.{name}", folder).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    assert not re.search(r"^\s*(from|import) moeify", (folder / "modeling_moeify.py").read_text(), re.MULTILINE)
    return model


@pytest.mark.parametrize("family", ["llama", "bart", "bert", "vit"])
def test_transformers_opens_what_was_saved_and_saves_it_again(family, tmp_path, monkeypatch):
    model = saved(tmp_path / "saved", family)
    again = opened(tmp_path / "saved", AUTO[family])
    assert isinstance(again, type(model))
    assert_same(again, model)
    again.save_pretrained(tmp_path / "again")
    assert_same(opened(tmp_path / "again", AUTO[family]), model)
    assert_same(load(tmp_path / "again"), model)
    assert_same(standing_alone(tmp_path / "again", monkeypatch, tmp_path), model)


@pytest.mark.parametrize("recipe", PLAIN)
def test_the_modelling_file_computes_what_moeify_computes(recipe, tmp_path, monkeypatch):
    model = saved(tmp_path / "saved", "gpt2" if recipe == "logits" else "llama", PLAIN[recipe])
    alone = standing_alone(tmp_path / "saved", monkeypatch, tmp_path)
    assert_same(alone, model)
    assert {n: p.requires_grad for n, p in alone.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert_same(opened(tmp_path / "saved"), model)


@pytest.mark.parametrize("recipe", NOT_PLAIN)
def test_the_modelling_file_of_other_layers_says_that_it_needs_moeify(recipe, tmp_path, monkeypatch):
    model = saved(tmp_path, "vit", NOT_PLAIN[recipe])
    again = opened(tmp_path, "AutoModelForImageClassification")
    assert_same(again, model)
    code = (tmp_path / "modeling_moeify.py").read_text()
    names: dict = {}
    exec(code, names)
    assert names["SparseViTForImageClassification"] is type(again)
    monkeypatch.setitem(sys.modules, "moeify.store.modelling", None)
    with pytest.raises(ImportError, match="so it needs moeify: pip install moeify"):
        exec(code, {})


PROGRAM = """
import sys, torch, transformers
torch.manual_seed(0)
for folder, auto in zip(sys.argv[2::2], sys.argv[3::2]):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        inputs, want = torch.load(folder + ".pt")
        got = model(**inputs).logits
    assert (got - want).abs().max() <= 1e-6 * want.abs().max(), folder
assert "moeify" not in sys.modules
sys.path[:0] = [sys.argv[1]]
from store.test_anywhere import saved
saved(sys.argv[2] + "-other", "t5")
"""


def test_a_process_without_moeify_opens_them_and_another_process_writes_the_same_bytes(tmp_path):
    arguments = []
    for family in ("t5", "vit"):
        model = saved(tmp_path / family, family)
        with torch.no_grad():
            torch.save((inputs(model), model(**inputs(model)).logits), tmp_path / f"{family}.pt")
        arguments += [str(tmp_path / family), AUTO[family]]
    settings = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "1"}
    tests = os.path.dirname(os.path.dirname(__file__))
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, tests, *arguments], env=os.environ | settings, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for path in (tmp_path / "t5").iterdir():
        assert path.read_bytes() == (tmp_path / "t5-other" / path.name).read_bytes(), path.name


def test_routers_stay_in_fp32_in_a_model_of_half_precision(tmp_path):
    saved(tmp_path / "saved", recipe=PLAIN["groups"])
    model = opened(tmp_path / "saved", dtype=torch.bfloat16)
    assert {part.dtype for name, part in model.state_dict().items() if ".router." in name} == {torch.float32}
    assert {part.dtype for name, part in model.state_dict().items() if ".router." not in name} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "half")
    half = opened(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    assert_same(half, model)
    assert_same(load(tmp_path / "half"), model)


def test_accelerate_places_a_model_on_devices_and_on_disk(tmp_path):
    model = saved(tmp_path / "saved")
    assert_same(opened(tmp_path / "saved", device_map="auto"), model)
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    spread = opened(
        tmp_path / "saved", device_map=places | {"model.layers.1": "disk"}, offload_folder=tmp_path / "disk"
    )
    assert spread.model.layers[1].mlp.experts.down_proj.is_meta
    assert_same(spread, model)


@torch.no_grad()
def test_the_model_without_its_head_and_with_another_is_sparse_too(tmp_path):
    model, ids = saved(tmp_path / "saved"), tokens()
    body = AutoModel.from_pretrained(tmp_path / "saved")
    hidden = model.model(ids).last_hidden_state
    assert (body(ids).last_hidden_state - hidden).abs().max() <= 1e-6 * hidden.abs().max()
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", num_labels=3)
    body.save_pretrained(tmp_path / "body")
    classifier.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(again(ids).logits, classifier(ids).logits)
    assert torch.equal(load(tmp_path / "classifier")(ids).logits, classifier(ids).logits)
    assert torch.equal(load(tmp_path / "body")(ids).last_hidden_state, body(ids).last_hidden_state)


def test_an_opened_model_is_saved_and_described_as_the_one_that_sparsify_made(tmp_path):
    model = saved(tmp_path / "saved")
    model.generation_config.eos_token_id = [2, 7]
    save(model, tmp_path / "saved")
    again = opened(tmp_path / "saved")
    assert again.generation_config.eos_token_id == [2, 7]
    assert Origin.of(again).recipe.to_dict() == Origin.of(model).recipe.to_dict()
    save(again, tmp_path / "again")
    for path in (tmp_path / "saved").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    assert_same(copy.deepcopy(again), model)
    again.save_pretrained(tmp_path / "saved")
    assert len({path.stat().st_mode for path in (tmp_path / "saved").iterdir()}) == 1  # others may read them
    assert_same(load(tmp_path / "saved"), model)


class Hub:
    """Stands in for the Hub, and keeps the bytes that it is sent."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **_):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id: str, operations: list, **_) -> None:
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()


def test_what_is_pushed_to_the_hub_opens(tmp_path, monkeypatch):
    model = saved(tmp_path / "saved")
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", hub := Hub())
    card = huggingface_hub.ModelCard("# A model")
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: card)
    opened(tmp_path / "saved").push_to_hub("someone/sparse")
    (tmp_path / "pulled").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "pulled" / name).write_bytes(content)
    assert_same(opened(tmp_path / "pulled"), model)
    assert_same(standing_alone(tmp_path / "pulled", monkeypatch, tmp_path), model)


def test_peft_puts_adapters_on_an_opened_model(tmp_path):
    peft = pytest.importorskip("peft")
    saved(tmp_path / "saved")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(opened(tmp_path / "saved"), settings)
    adapted(**inputs(adapted)).loss.backward()
    assert {n for n, p in adapted.named_parameters() if p.grad is not None} == {
        n for n, _ in adapted.named_parameters() if "lora_" in n
    }
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(opened(tmp_path / "saved"), tmp_path / "adapter")
    assert_same(again.eval(), adapted.eval())


def test_a_pipeline_generates_with_an_opened_model(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    model = saved(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = transformers.pipeline("text-generation", model=str(tmp_path))
    text = generate("w7 w9", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    ids = model.generate(torch.tensor([[7, 9]]), max_new_tokens=4, do_sample=False)[0]
    assert re.findall(r"w\d+", text) == [f"w{int(i)}" for i in ids]


def test_a_class_of_ones_own_is_not_taken_for_that_of_transformers(tmp_path):
    class Own(transformers.LlamaForCausalLM):
        pass

    model = DENSE["llama"]()
    model.__class__ = Own
    save(sparsify(model, COPIES, verbose=False), tmp_path)
    with pytest.raises(ValueError, match=r"holds a transformers\.Own, which is not a model of transformers"):
        load(tmp_path)
    assert not (tmp_path / "modeling_moeify.py").exists()
