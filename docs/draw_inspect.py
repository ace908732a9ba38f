"""Draw docs/images/inspect.png, the README's picture: four panels of the page that `moeify inspect` wrote about a run.

    moeify inspect runs/demo --generate 8 && python docs/draw_inspect.py runs/demo/inspect.html

Needs `pip install -e '.[browser]'` and a Chromium.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

COLUMNS = (("Coloured text", "Training over time"), ("Specialisation by domain", "Causal score"))
"""The panels, by their titles."""
WIDTH = 1280
STYLE = """
.drawn { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 1rem; align-items: start; }
.drawn .panel { margin: 0 0 1rem; } [role=tablist], details.missing, main > .note, #hint { display: none; }
"""
PLACE = """columns => {
    document.querySelectorAll('[role=tab]').forEach(tab => tab.click());
    const main = document.querySelector('main');
    const drawn = document.createElement('div');
    drawn.className = 'drawn';
    const found = [...document.querySelectorAll('.panel')];
    for (const titles of columns) {
        const column = document.createElement('div');
        column.append(...titles.map(title => found.find(panel => panel.querySelector('h2').textContent === title)));
        drawn.append(column);
    }
    document.querySelectorAll('[data-tab]').forEach(tab => tab.remove());
    main.append(drawn);
}"""


def draw(page_file: Path, picture: Path) -> None:
    """Open the page, put the panels side by side, point at a token, and take the picture."""
    with sync_playwright() as started:
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": WIDTH, "height": 800}, bypass_csp=True)
        page = context.new_page()
        page.goto(page_file.resolve().as_uri())
        page.add_style_tag(content=STYLE)
        page.evaluate(PLACE, [list(titles) for titles in COLUMNS])
        page.wait_for_timeout(500)  # charts are drawn again in their new width
        page.locator(".text span").nth(30).dispatch_event("pointerover", {"bubbles": True})
        page.screenshot(path=picture, full_page=True)
        browser.close()


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(__file__).parent / "images" / "inspect.png")
