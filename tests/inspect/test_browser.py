"""The page in a real browser: it renders, asks for nothing, logs nothing, and all of it works by keyboard.

Needs playwright (the extra `browser`) and a Chromium: one of the system, or the one that `playwright install` brings.
"""

import shutil

import pytest
import torch

from inspect_routes import HOSTILE, random_trace
from moeify.inspect import report
from moeify.inspect.panels.patches import patches

playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {error}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    trace = random_trace()
    made = report(trace)
    images = random_trace(sequences=2, length=17)
    made.add("Images", "patches", lambda: patches(images, [torch.rand(3, 16, 16), torch.rand(3, 16, 16)]))
    path = tmp_path_factory.mktemp("page") / "page.html"
    made.write(path)
    return path


@pytest.fixture
def page(browser, file):
    """The page, open; at the end it has logged nothing and asked for nothing but itself."""
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    yield page
    assert not said
    assert asked == [file.as_uri()]
    context.close()


def painted(page, selector):
    """How many different colours a canvas has."""
    return page.locator(selector).first.evaluate(
        "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
    )


def test_every_tab_renders_and_nothing_is_wider_than_a_phone(page):
    tabs = page.get_by_role("tab")
    assert tabs.count() >= 6
    for i in range(tabs.count()):
        tabs.nth(i).click()
        assert page.get_by_role("tabpanel").count() == 1
        charts = page.locator("[role=tabpanel]:not([hidden]) [data-chart]")
        assert charts.count()
        for j in range(charts.count()):
            assert charts.nth(j).locator("canvas, .text").count(), charts.nth(j).get_attribute("data-label")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    tabs.first.click()
    assert painted(page, ".plot canvas") > 5


def test_hostile_tokens_do_not_run(page):
    page.get_by_role("tab", name="Text").click()
    assert page.title() == HOSTILE.replace("\u202e", "\\u202e")
    assert page.locator("img, main script").count() == 0


def test_tabs_charts_and_choices_work_by_keyboard(page):
    page.get_by_role("tab").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", selected=True).inner_text() == "Router"
    page.keyboard.press("Home")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    select = page.locator("[role=tabpanel]:not([hidden]) select").first
    chart = page.locator(".plot").first
    chart.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    said = page.locator(".plot + output").first
    assert said.inner_text().startswith("layer 1, expert 1: ")
    select.focus()
    page.keyboard.press("ArrowDown")
    assert select.input_value() == "1"


def test_what_the_pointer_shows_the_keyboard_shows(page):
    chart, said = page.locator(".plot").first, page.locator(".plot + output").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 8, box["y"] + 24)
    by_pointer = said.inner_text()
    chart.focus()
    page.keyboard.press("Home")
    assert said.inner_text() != by_pointer
    page.keyboard.press("End")
    assert said.inner_text() == by_pointer


def test_a_token_says_its_experts_and_weights_in_the_layer_that_is_chosen(page):
    page.get_by_role("tab", name="Text").click()
    text = page.locator(".text")
    text.focus()
    page.keyboard.press("ArrowRight")
    said = page.locator(".text + output")
    assert said.inner_text().startswith("token 1 of 16, “")
    assert "layer 0: experts " in said.inner_text()
    assert text.locator(".same").count() >= 1
    page.locator("label", has_text="layer").locator("select").select_option(label="2")
    assert "layer 2: experts " in said.inner_text()


def test_a_patch_says_its_expert(page):
    page.get_by_role("tab", name="Images").click()
    panel = page.locator("[role=tabpanel]:not([hidden])")
    panel.locator(".plot").focus()
    page.keyboard.press("End")
    assert panel.locator(".plot + output").inner_text().startswith("patch 0, 3, layer 0: expert ")


def test_colours_follow_the_system_and_the_button(browser, file):
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(file.as_uri())
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Light colours").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    context.close()


def test_findings_lead_to_their_panel(page):
    page.locator("details.quiet summary").click()
    page.locator(".glance a", has_text="Paths across layers").click()
    assert page.get_by_role("tab", selected=True).inner_text() == "Structure"
    assert page.locator("section:focus h2").inner_text() == "Paths across layers"


def test_without_scripts_the_numbers_and_the_advice_are_there(browser, file):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    page.locator("details", has_text="Numbers").first.locator("summary").click()
    assert page.get_by_role("cell", name="prefill").first.is_visible()
    assert page.locator(".advice").count() >= 12
    context.close()
