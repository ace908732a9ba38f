"""The model card: true figures, the licence of the dense model, and never in the place of a card of one's own."""

import re

import torch

from moeify import Recipe, save, sparsify
from moeify.flops import count
from moeify.routers import Soft
from moeify.sparsify import fresh
from moeify.store import verify
from tiny_models import DENSE, causal_lm


def sparse(base: str = "", recipe: Recipe | None = None) -> torch.nn.Module:
    model = causal_lm("llama")
    model.config._name_or_path = base
    return sparsify(model, recipe or Recipe(num_experts=4), verbose=False, allow_noncausal=True)


def test_a_card_says_what_a_model_is_and_how_to_open_it(tmp_path):
    model = sparse()
    save(model, tmp_path, notes={"Data": "stories | tales"})
    text = (tmp_path / "README.md").read_text("utf-8")
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert head.startswith("library_name: transformers\npipeline_tag: text-generation\ntags:\n- moeify\n")
    assert "license" not in head
    assert f"| Parameters | {count(model).parameters:,} |" in body
    assert f"| Active parameters per token | {count(model).active_parameters:,} |" in body
    assert r"| Data | stories \| tales |" in body
    assert "| Balance | not recorded |" in body
    assert "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)" in body
    assert "needs torch and transformers only" in body


def test_a_card_says_where_moeify_is_needed(tmp_path):
    save(sparse(recipe=Recipe(num_experts=4, router=Soft, experts=fresh)), tmp_path)
    assert "needs `pip install moeify`" in (tmp_path / "README.md").read_text("utf-8")


def test_the_licence_of_a_dense_model_is_that_of_its_card(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# Base\nlicense: not this\n")
    save(sparse(str(base)), tmp_path / "sparse")
    text = (tmp_path / "sparse" / "README.md").read_text("utf-8")
    assert "\nlicense: mit\n---" in text
    assert "| Licence | mit |" in text
    assert str(tmp_path) not in text
    save(sparse("someone/model"), tmp_path / "hub")
    assert "\nbase_model: someone/model\n" in (tmp_path / "hub" / "README.md").read_text("utf-8")


def test_a_card_of_ones_own_is_left_alone_and_that_of_before_replaced(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("mine")
    save(sparse(), tmp_path)
    assert card.read_text() == "mine"
    verify(tmp_path)
    card.unlink()
    save(sparse(), tmp_path)
    save(sparsify(DENSE["gpt2"](), Recipe(num_experts=2), verbose=False), tmp_path)
    assert re.search(r"^# SparseGPT2LMHeadModel$", card.read_text(), re.MULTILINE)
    card.write_text(card.read_text() + "and more")
    save(sparse(), tmp_path)
    assert card.read_text().endswith("and more")
