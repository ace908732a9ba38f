"""The compatibility of a recipe with other programs comes true, and the table of the guide shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from export_models import sparse
from moeify import export
from moeify.export import compatibility, families
from moeify.export.table import compatibilities, graphs, programs, read_results, row, table
from moeify.sparsify import recipes

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "export.md"


def test_a_recipe_is_held_exactly_by_rewrites_or_not_at_all_with_the_reason():
    of_llama = {name: compatibility(recipes[name], "llama") for name in ("mixtral", "matched", "soft", "switch")}
    assert [found["transformers"].kind for found in of_llama.values()] == ["exact", "rewrite", "unsupported", "rewrite"]
    assert of_llama["matched"]["gguf"].architecture == "glm4moe"
    assert "router, Soft, does not choose the top k" in of_llama["soft"]["gguf"].reason
    assert of_llama["switch"]["transformers"].without_capacity


def test_the_compatibility_of_a_recipe_comes_true(tmp_path):
    found = compatibility(recipes["deepseek"], "qwen3")["transformers"]
    done = export.write(sparse("qwen3", "deepseek"), tmp_path / "out")
    assert done.notes == [f"{found.architecture} (Dots1ForCausalLM)", *found.rewrites]


def test_an_unknown_family_is_an_error():
    with pytest.raises(ValueError, match="did you mean 'llama'"):
        compatibility(recipes["mixtral"], "llam")


def test_the_table_of_the_guide_is_the_compatibility_of_the_recipes():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    heads, cells = (next(line for line in lines if line.startswith(f"| {name} |")) for name in ("recipe", "`deepseek`"))
    of_base = dict(zip(heads.split(" | "), cells.split(" | "), strict=True))
    for base in ("llama", "qwen3"):
        assert (
            row("deepseek", compatibilities("deepseek", [base]), read_results(PAGE))
            == f"| `deepseek` | {of_base[families.DENSE[base].title]} |"
        )


def test_recipes_that_no_program_can_hold_have_a_row_with_the_reason():
    lines = table(["soft"], ["llama"], {}).splitlines()
    assert lines[-1] == f"| `soft` | {compatibility(recipes['soft'], 'llama')['transformers'].reason} |"
    assert lines[-1] in PAGE.read_text(encoding="utf-8").splitlines()


def test_a_cell_that_was_not_run_is_in_italics():
    found = compatibilities("mixtral", ["llama"])
    passed = {("mixtral", "llama", to): {"result": "passed"} for to in ("transformers", "mlx")}
    assert row("mixtral", found, {}) == "| `mixtral` | *Mixtral*, *llama+*, *mlx* |"
    assert row("mixtral", found, passed) == "| `mixtral` | Mixtral, *llama+*, mlx |"


def test_a_graph_has_its_difference_or_the_reason_or_was_not_run():
    ran = {"result": "passed", "difference": "3.1e-06", "kind": "capacity off, exact"}
    refused = {"result": "refused", "reason": "it cannot"}
    results = {("soft", "llama", "torch"): ran, ("soft", "vit", "torch"): refused}
    last = graphs(["soft"], results).splitlines()[-1]
    assert last.startswith("| `soft` | texts 3e-06†, images (it cannot) | not run | not run | refused: its layers are")


def test_every_program_stands_with_its_version_and_its_least_agreement():
    result = {"result": "passed", "program": "mlx-lm 1.2", "difference": "1e-06", "same_top_token": "1"}
    worse = result | {"difference": "3.4e-06", "same_top_token": "0.998"}
    results = {
        ("a", "llama", "mlx"): result,
        ("b", "llama", "mlx"): worse,
        ("c", "llama", "mlx"): {"result": "refused"},
    }
    assert programs(results).splitlines()[2:] == ["| MLX | mlx-lm 1.2 | 2 | 3e-06 | at 0.998 of the positions |"]
    page = PAGE.read_text(encoding="utf-8")
    assert programs(read_results(PAGE)) in page


def test_no_export_of_the_table_failed_in_its_program():
    results = read_results(PAGE)
    assert len(results) > 180
    assert not [key for key, row in results.items() if row["result"] == "failed"]


def test_the_guide_explains_every_trait():
    text = PAGE.read_text(encoding="utf-8")
    explained = {
        name for line in text.splitlines() if line.startswith("| `") for name in line.split(" | ")[0].split("`")
    }
    assert not {*families.DECODER, *families.EXPERTS} - explained


def test_every_recipe_is_in_the_table():
    text = PAGE.read_text(encoding="utf-8")
    assert not [name for name in recipes if f"| `{name}` |" not in text]


def test_a_router_with_a_hidden_layer_is_refused_with_the_reason():
    assert "has a hidden layer" in compatibility(recipes["llama_moe"], "llama")["transformers"].reason
