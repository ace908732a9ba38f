"""The report is one well-formed file that says what was measured and runs nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import torch

from moeify.evaluate.run import Point, Run
from moeify.evaluate.versus import Versus
from moeify.flops import Count
from moeify.inspect import ExpertLoad, write_report
from moeify.inspect.page import table

COUNT = Count(parameters=1234, active_parameters=617, flops=99, dense_flops=99)
NASTY = "<script>alert('&')</script>"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Fails on a tag that is closed out of order; keeps texts and pictures."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.texts, self.pictures = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag == "img":
            self.pictures.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def arm(name, *losses):
    return [
        Run(name, seed, COUNT, [Point(0, 0, 0, 0, 5.0), Point(1, 10, 10, 2, loss)], {})
        for seed, loss in enumerate(losses)
    ]


def report(folder, sparse=(2.0,), dense=(2.5,), load=None):
    picture = folder / f"a{NASTY.replace('/', '')}.png"
    picture.write_bytes(b"picture")
    write_report(
        folder / "report.html", Versus(arm("sparse", *sparse), arm("dense", *dense)), load, [picture],
        {f"sparse {NASTY}": [NASTY]}, {"model": NASTY, "steps": 3},
    )  # fmt: skip
    return Page((folder / "report.html").read_text())


def test_every_tag_is_closed_and_no_text_becomes_a_tag(tmp_path):
    page = report(tmp_path)
    assert "script" not in page.seen
    assert NASTY in page.texts
    assert page.texts.count(NASTY) == 2


def test_pictures_are_inside_the_file(tmp_path):
    (picture,) = report(tmp_path).pictures
    kind, _, data = picture["src"].partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == b"picture"
    assert "<script>" in picture["alt"]


def test_the_page_may_load_and_run_nothing(tmp_path):
    report(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', text)[1]
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    allowed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; img-src data:; style-src 'sha256-{allowed}'")
    assert text.index(policy) < text.index("<style>")
    assert " style=" not in text


def test_names_that_utf8_cannot_say_are_escaped(tmp_path):
    load = ExpertLoad(("caf\udce9",), ("code",), torch.tensor([[[3.0, 1]]]))
    assert "caf\\udce9" in report(tmp_path, load=load).texts


def test_the_verdict_comes_first_then_pictures_then_numbers_then_facts(tmp_path):
    report(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    order = [
        "The sparse model is ahead at equal tokens",
        "<img",
        "Validation loss when",
        "Size and speed",
        "What was run",
    ]
    assert sorted(order, key=text.index) == order


def test_the_numbers_are_those_of_the_runs(tmp_path):
    assert {"2.0000", "2.5000", "-0.5000", "one seed", "1,234", "617", "5"} <= set(report(tmp_path).texts)
    assert "± 0.7071 over 2 seeds" in report(tmp_path, (2.0, 2.0), (2.5, 3.5)).texts


def test_the_load_is_shown_if_it_was_measured(tmp_path):
    assert "Experts" not in report(tmp_path).texts
    load = ExpertLoad(("model.layers.0.mlp",), ("code",), torch.tensor([[[3.0, 1]]]))
    assert {"Experts", "model.layers.0.mlp", "0.50", "0.000"} <= set(report(tmp_path, load=load).texts)


def test_a_table_has_as_many_cells_as_it_is_given():
    page = Page(table(("a", "b"), [(1, NASTY), (2, 3)]))
    assert page.texts == ["a", "b", "1", NASTY, "2", "3"]
    assert [page.seen.count(tag) for tag in ("tr", "th", "td")] == [3, 2, 4]
