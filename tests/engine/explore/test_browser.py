"""The page in a real browser: it loads, draws, selects, filters, searches, and says what went wrong."""

import math
import threading
from pathlib import Path

import numpy as np
import pytest
from chromium import Browser, needs_chromium

from armillary.engine.explore.api import Pages
from armillary.engine.explore.server import Server

pytestmark = [needs_chromium, pytest.mark.slow]

LIT = """
(() => {
  const from = document.getElementById("points");
  const to = new OffscreenCanvas(from.width, from.height).getContext("2d");
  to.drawImage(from, 0, 0);
  const bytes = to.getImageData(0, 0, from.width, from.height).data;
  let lit = 0;
  for (let i = 3; i < bytes.length; i += 4) lit += bytes[i] > 60;
  return lit;
})()
"""


@pytest.fixture(scope="module")
def served(objects, similar):
    """The page with a search by files that knows one file and refuses all others."""
    pages = Pages(objects, similar, {"map": "PCA: of a test", "run": "toy", "readout": ""}, "redshift")
    server = Server("127.0.0.1", 0)
    server.listen(pages)
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def browser():
    with Browser() as running:
        yield running


@pytest.fixture
def page(browser, served):
    browser.events.clear()
    opened = browser.open(served.url)
    opened.wait("document.body?.dataset.ready === 'yes'")
    yield opened
    assert [said for said in opened.complaints() if "404" not in said and "422" not in said] == []
    opened.close()


def place(page, number):
    """Pixels of a point on the screen, from what the server sent: the map is not moved."""
    return page.evaluate(
        f"""(async () => {{
          const p = new Uint16Array(await (await fetch("api/points")).arrayBuffer());
          const [xs, ys] = [0, 1].map((o) => p.filter((_, i) => i % 2 === o));
          const size = (v) => Math.max((Math.max(...v) - Math.min(...v)) / 65535, 0.05);
          const box = document.getElementById("overlay").getBoundingClientRect();
          const side = 0.9 * Math.min(box.width / size(xs), box.height / size(ys));
          return [box.x + box.width / 2 + (xs[{number}] / 65535 - 0.5) * side,
                  box.y + box.height / 2 - (ys[{number}] / 65535 - 0.5) * side];
        }})()"""
    )


def status(page):
    return page.text("#status")


def test_it_loads_and_draws(page, objects):
    assert page.text("#survey") == "fifty" and status(page).startswith("49 galaxies")
    assert page.wait(LIT) > 500  # 49 points of some 20 pixels
    assert page.evaluate("document.querySelectorAll('#grid button').length") == 48
    assert page.evaluate("document.querySelectorAll('#histograms article').length") == 4
    assert page.wait("[...document.querySelectorAll('#grid img')].filter((i) => i.naturalWidth).length > 8")
    assert "redshift" in page.text("#legend")
    names = page.evaluate("performance.getEntriesByType('resource').map((e) => new URL(e.name).host)")
    assert len(set(names)) == 1  # nothing from elsewhere


def test_a_click_opens_the_galaxy_under_it(page, objects):
    x, y = place(page, 5)
    page.mouse("mousePressed", x, y, button="left", clickCount=1)
    page.mouse("mouseReleased", x, y, button="left", clickCount=1)
    assert page.wait("document.querySelector('#details h2')?.textContent") == objects.key(5)
    page.wait("document.querySelector('#details svg.spectrum polyline')")
    page.press("s")
    page.wait("document.getElementById('title').textContent.startsWith('Most similar')")
    assert "48 selected" in status(page)
    page.press("Escape", 27)
    assert page.wait("document.getElementById('details').hidden") and "selected" not in status(page)


def test_a_lasso_selects_what_is_inside(page, objects):
    from armillary.engine.explore.objects import GRID

    x, y = place(page, 7)
    radius = 120
    corners = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 30)]
    shift = {"button": "left", "modifiers": 8}
    page.mouse("mousePressed", *corners[0], clickCount=1, **shift)
    for corner in corners[1:]:
        page.mouse("mouseMoved", *corner, buttons=1, **shift)
    page.mouse("mouseReleased", *corners[-1], clickCount=1, **shift)
    page.wait("document.getElementById('status').textContent.includes('selected')")
    grid = objects.grid_points().astype(float) / GRID
    here, there = place(page, 0), place(page, 1)
    a, b = (0, 1) if abs(grid[0, 0] - grid[1, 0]) > 1e-3 else (0, 2)
    there = place(page, b)
    side = (there[0] - here[0]) / (grid[b, 0] - grid[a, 0])
    away = np.hypot(*((grid - grid[7]) * side).T)
    certain, possible = (away < radius * 0.97).sum(), (away < radius * 1.03).sum()  # the lasso has corners
    assert certain <= int(status(page).split("·")[1].split()[0]) <= possible and certain < 49


def test_filters_add_up(page, objects):
    redshift, kind = objects.values("redshift"), objects.values("kind")
    page.evaluate(
        """(() => { const input = document.querySelector("[aria-label='redshift: least value']");
        input.value = "0.2"; input.dispatchEvent(new Event("change")); })()"""
    )
    assert f"{(redshift >= 0.2).sum()} pass" in status(page)
    page.evaluate(
        "[...document.querySelectorAll('.words button')].find((b) => b.textContent.startsWith('spiral')).click()"
    )
    spirals = (redshift >= 0.2) & (kind == objects.labels["kind"].categories.index("spiral"))
    assert f"{spirals.sum()} pass" in status(page)
    page.wait(f"document.querySelectorAll('#grid button').length === {spirals.sum()}")
    page.click("#clear")
    assert "pass" not in status(page)


def test_find_by_key_and_position(page, objects):
    def find(text):
        page.evaluate(
            f"(() => {{ document.getElementById('query').value = {text!r};"
            "document.getElementById('search').requestSubmit(); })()"
        )

    find(objects.key(9))
    assert page.wait("document.querySelector('#details h2')?.textContent") == objects.key(9)
    about = objects.describe(12)
    find(f"{about['ra']} {about['dec']}")
    page.wait(f"document.querySelector('#details h2')?.textContent === {objects.key(12)!r}")
    page.wait("document.getElementById('problem').textContent.includes('away')")
    assert page.evaluate("document.getElementById('problem').className") == "well"
    find("nobody")
    assert page.wait("document.getElementById('problem').textContent.includes('is no key here')")
    assert page.evaluate("document.getElementById('problem').className") == ""


DROP = """
(() => {
  const data = new DataTransfer();
  data.items.add(new File([%s], "broken.fits"));
  window.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
})()
"""


def test_a_broken_file_ends_in_a_sentence(page, similar, monkeypatch):
    page.evaluate(DROP % "'x'")
    assert "start `armillary explore` with --run RUN" in page.wait("document.getElementById('problem').textContent")
    monkeypatch.setattr(similar, "_run", Path("run"))  # as if there were one
    page.send("Page.reload")
    page.wait("document.body?.dataset.ready === 'yes'")
    page.evaluate(DROP % "'SIMPLE'")
    said = page.wait("document.getElementById('problem').textContent")
    assert said.startswith("broken.fits cannot be searched for") and "Traceback" not in said
    page.evaluate(DROP % "new Uint8Array(65 << 20)")
    page.wait("document.getElementById('problem').textContent === 'broken.fits is larger than 64 MiB.'")
    assert status(page).startswith("49 galaxies")  # the page goes on


def test_the_keyboard_alone(page, objects):
    page.evaluate("document.getElementById('overlay').focus()")
    for key in ("+", "ArrowLeft", "0"):
        page.press(key)
    page.press("Enter", 13, "\r")
    page.wait("document.querySelector('#details h2')")
    page.press("a")
    assert page.wait("document.getElementById('status').textContent.includes('49 selected')")
    page.evaluate("document.querySelector('#grid button').focus()")
    page.press("ArrowRight", 39)
    second = page.evaluate("Number(document.activeElement.dataset.number)")
    assert second == page.evaluate("Number(document.querySelectorAll('#grid button')[1].dataset.number)")
    page.press("Enter", 13, "\r")
    page.wait(f"document.querySelector('#details h2').textContent === {objects.key(second)!r}")
    page.press("/")
    assert page.evaluate("document.activeElement.id") == "query"
    page.press("Escape", 27)
    page.press("?")
    assert page.evaluate("document.getElementById('dialog').open")
    unnamed = page.evaluate(
        """[...document.querySelectorAll("button, input, select")].filter((e) => !e.hidden && !(e.textContent.trim()
        || e.getAttribute("aria-label") || e.labels?.length)).map((e) => e.outerHTML)"""
    )
    assert unnamed == []


def test_light_and_dark(page):
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.theme("light")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark != light
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
    page.evaluate("localStorage.clear()")


def test_a_thousand_requests_from_the_page(page):
    right = page.evaluate(
        """(async () => {
          let right = 0;
          for (let round = 0; round < 20; round += 1) {
            const asked = Array.from({ length: 50 }, (_, i) => fetch(i % 2 ? `api/objects/${i % 49}` : "api/points"));
            for (const reply of await Promise.all(asked)) right += reply.ok && (await reply.arrayBuffer()).byteLength > 100;
          }
          return right;
        })()"""
    )
    assert right == 1000
