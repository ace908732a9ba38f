"""The report of every MoE family: a page, and a reason for all that is missing. Run by `make nightly`."""

import pytest

from moe_families import FAMILIES, build, inputs
from moeify.inspect import report

MEASURED = {"similarity of experts", "super experts", "causal score"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_a_page(family, tmp_path):
    model = build(family)
    made = report(model, [inputs(model)], file=tmp_path / "page.html")
    titles = {panel.title.lower() for panel in made.panels}
    assert {"load", "dead experts", "coverage", "top tokens"} <= titles
    missing = {name for reason in made.missing for name in reason.partition(":")[0].split(", ")}
    assert titles & MEASURED | missing >= MEASURED
