"""A plan says what becomes of a recipe, and the table in the guide is what the plans say."""

from __future__ import annotations

from pathlib import Path

import pytest

from export_models import sparse
from moeify import export
from moeify.export import families, plan
from moeify.export.table import outlooks, row, table
from moeify.sparsify import recipes

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "export.md"


def test_a_plan_is_exact_a_rewrite_or_refused_with_the_reason():
    of_llama = {name: plan(recipes[name], "llama") for name in ("mixtral", "matched", "soft", "switch")}
    assert [outlook["transformers"].kind for outlook in of_llama.values()] == ["exact", "rewrite", "refused", "rewrite"]
    assert of_llama["matched"]["gguf"].home == "glm4moe"
    assert "Soft is no token choice" in of_llama["soft"]["gguf"].reason
    assert of_llama["switch"]["transformers"].without_capacity


def test_a_plan_comes_true(tmp_path):
    outlook = plan(recipes["deepseek"], "qwen3")["transformers"]
    done = export.write(sparse("qwen3", "deepseek"), tmp_path / "out")
    assert done.notes == [f"{outlook.home} (Dots1ForCausalLM)", *outlook.rewrites]


def test_an_unknown_family_is_an_error():
    with pytest.raises(ValueError, match="did you mean 'llama'"):
        plan(recipes["mixtral"], "llam")


def test_the_table_of_the_guide_is_what_the_plans_say():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    heads, cells = (next(line for line in lines if line.startswith(f"| {name} |")) for name in ("recipe", "`deepseek`"))
    of_base = dict(zip(heads.split(" | "), cells.split(" | "), strict=True))
    for base in ("llama", "qwen3"):
        assert (
            row("deepseek", outlooks("deepseek", [base])) == f"| `deepseek` | {of_base[families.DENSE[base].title]} |"
        )


def test_recipes_without_a_home_have_a_row_with_the_reason():
    lines = table(["soft"], ["llama"]).splitlines()
    assert lines[-1] == f"| `soft` | {plan(recipes['soft'], 'llama')['transformers'].reason} |"
    assert lines[-1] in PAGE.read_text(encoding="utf-8").splitlines()


def test_every_recipe_is_in_the_table():
    text = PAGE.read_text(encoding="utf-8")
    assert not [name for name in recipes if f"| `{name}` |" not in text]
