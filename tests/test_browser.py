"""Both pages in a real browser, from the disk: what people see, click and press."""

import base64
import io
import re

import numpy as np
import pytest
from browser import Browser, chromium
from command import DIGITS, command, write_config
from html_pages import comparison, png, shown_rows
from PIL import Image
from sklearn.datasets import load_digits

from boot_jax.evaluation.comparison_page import write_comparison
from boot_jax.evaluation.sample_rows import distance_text

TINY = (
    *("teacher.training.num_steps=10", "distill.num_steps=10", "run.log_every=5"),
    *("run.tensorboard=False", "evaluation.num_images=32", "evaluation.ode_steps=3"),
    *("evaluation.ddim_steps=(1,2)", "evaluation.batch_size=32"),
    *("evaluation.selftest=True", "data.labels=True"),
)
METHODS = ("boot", "direct")

CONTRASTS = """
const parts = text => text.match(/[\\d.]+/g).map(Number);
const light = rgb => rgb.slice(0, 3).map(v => v / 255).map(
  v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = element => {
  for (let e = element; e; e = e.parentElement) {
    const colour = parts(getComputedStyle(e).backgroundColor);
    if (colour.length < 4 || colour[3] === 1) return colour;
  }
  throw new Error("nothing is behind " + element.textContent);
};
const found = [];
for (const element of document.body.querySelectorAll("*")) {
  const own = [...element.childNodes].some(
    node => node.nodeType === 3 && node.textContent.trim());
  if (!own || !element.checkVisibility() || element.closest("script")) continue;
  const ink = light(parts(getComputedStyle(element).color));
  const paper = light(behind(element));
  const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  found.push([ratio, element.textContent.trim().slice(0, 40)]);
}
return found;
"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(browser, tmp_path_factory):
    """Of a real run, which learns next to nothing."""
    folder = tmp_path_factory.mktemp("seen")
    flags = (f"--config.{flag}" for flag in TINY)
    config = write_config(folder, DIGITS)
    assert command(config, f"--workdir={folder / 'run'}", *flags) == 0
    return folder / "run" / "report.html"


@pytest.fixture(scope="module")
def compared(browser, tmp_path_factory):
    path = tmp_path_factory.mktemp("compared") / "comparison.html"
    write_comparison(
        path,
        title="Methods",
        comparison=comparison(),
        images={"a plot": png()},
        rows=shown_rows(METHODS, ("", "", "a red <circle>", ""))[0],
        config={"seed": 0},
    )
    return path


@pytest.fixture(params=[pytest.param("report", marks=pytest.mark.slow), "compared"])
def page(request):
    return request.getfixturevalue(request.param)


def decoded(source: str) -> np.ndarray:
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image, float)


def dialog(browser: Browser) -> dict | None:
    """What the open dialog shows; None where none is open."""
    return browser.run(
        """
        const viewer = document.getElementById("viewer"), at = name =>
          viewer.querySelector(name);
        return viewer.open ? {
          title: at("h3").textContent, caption: at(".large figcaption").textContent,
          sample: at(".large img").src, told: at(".told").textContent,
          near: [...viewer.querySelectorAll(".near figure")].map(
            f => [f.querySelector("img").src, f.textContent]),
        } : null;
        """
    )


def test_a_page_asks_for_nothing_and_has_no_errors(browser, page):
    browser.requests(), browser.console()
    browser.open(page)
    browser.click("button.sample")
    browser.press("\ue00c")
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.requests() == [page.as_uri()]
    assert browser.console() == []
    broken = "return [...document.images].filter(i => i.src && !i.naturalWidth).length"
    assert browser.run(broken) == 0


def test_a_page_refuses_what_is_not_its_own(browser, page):
    browser.open(page)
    browser.requests(), browser.console()
    browser.run(
        """
        const script = document.createElement("script"), image = new Image();
        script.textContent = "document.title = 'taken over'";
        image.src = "http://127.0.0.1:9/beacon.png";
        document.body.append(script, image);
        """
    )
    assert browser.run("return document.title") != "taken over"
    assert browser.requests() == []
    refused = [line for line in browser.console() if "Content Security Policy" in line]
    assert len(refused) == 2


@pytest.mark.slow
def test_a_click_shows_the_real_images_nearest_to_the_sample(browser, report):
    browser.open(report)
    digits = load_digits().images[:200].reshape(200, -1) / 8.0 - 1.0
    sources = browser.run(
        "return [...document.querySelectorAll('button.sample img')].map(i => i.src)"
    )
    assert len(sources) == 2 * 4  # the teacher's 1 step, the student's
    for place in (0, 5):
        browser.click("button.sample", place)
        shown = dialog(browser)
        assert shown is not None
        row = ("teacher, 1 step", "student, 1 step")[place // 4]
        assert shown["title"] == f"{row}: sample {place % 4 + 1}"
        assert shown["caption"] == f"class {place % 4}"
        assert shown["sample"] == sources[place]
        # The page has the sample in 256 shades: its distances are known to 0.02.
        sample = decoded(sources[place]).ravel() / 127.5 - 1.0
        distances = np.linalg.norm(digits - sample, axis=1)
        told = [
            re.fullmatch(r"real image (\d+), distance (.+)", t)
            for _, t in shown["near"]
        ]
        indices = [int(match[1]) for match in told if match]
        found = [float(match[2]) for match in told if match]
        assert len(set(indices)) == 5 and found == sorted(found)
        np.testing.assert_allclose(found, distances[indices], atol=0.02)
        np.testing.assert_allclose(found, np.sort(distances)[:5], atol=0.02)
        for index, (source, _) in zip(indices, shown["near"], strict=True):
            expected = np.rint((digits[index] + 1.0) * 127.5)
            np.testing.assert_array_equal(decoded(source).ravel(), expected)
        assert f"The nearest real image is at {found[0]:#.4g}" in shown["told"]
        among = np.linalg.norm(digits[:, None] - digits, axis=-1)
        np.fill_diagonal(among, np.inf)
        middle = np.median(among.min(axis=1))
        assert (
            f"nearest other at {distance_text(middle)} in the median" in shown["told"]
        )
        browser.click("#viewer .close")
        assert dialog(browser) is None


def test_the_comparison_shows_the_neighbours_that_were_computed(browser, compared):
    rows = shown_rows(METHODS)[0]
    browser.open(compared)
    for place, sample in enumerate(sample for row in rows.values() for sample in row):
        browser.click("button.sample", place)
        shown = dialog(browser)
        assert shown is not None
        assert [text for _, text in shown["near"]] == [
            f"real image {near.index}, distance {distance_text(near.distance)}"
            for near in sample.neighbours
        ]
        assert shown["caption"] == ("a red <circle>" if place % 4 == 2 else "")
        browser.press("\ue00c")  # Escape


def focused(browser: Browser) -> int:
    """Which of the samples has the focus; -1 for none."""
    return browser.run(
        "return [...document.querySelectorAll('button.sample')]"
        ".indexOf(document.activeElement)"
    )


def test_the_keyboard_does_all_that_the_mouse_does(browser, page):
    tab, enter, escape, right, left = "\ue004", "\ue007", "\ue00c", "\ue014", "\ue012"
    browser.open(page)
    for _ in range(40):
        browser.press(tab)
        if focused(browser) == 0:
            break
    assert focused(browser) == 0
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.run(outline) == "solid"
    browser.press(tab, enter)
    first = dialog(browser)
    assert first is not None and first["title"].endswith("sample 2")
    browser.press(right)
    second = dialog(browser)
    assert second is not None and second["title"].endswith("sample 3")
    assert second["near"] != first["near"]
    browser.press(left)
    assert dialog(browser) == first
    browser.press(left, left)  # round to the last
    last = dialog(browser)
    assert last is not None and last["title"].endswith("sample 4")
    browser.press(escape)
    assert dialog(browser) is None
    assert focused(browser) == 7


def column(browser: Browser, number: int, table: int = 0) -> list[str]:
    return browser.run(
        """
        const [number, table] = arguments;
        const rows = document.querySelectorAll("table.sortable")[table].tBodies[0].rows;
        return [...rows].map(r => r.cells[number].firstChild.textContent.trim());
        """,
        number,
        table,
    )


def test_a_click_on_a_header_sorts(browser, compared):
    browser.open(compared)
    header = "table.sortable th button"
    browser.click(header, 6)
    before = column(browser, 3)
    browser.click(header, 3)
    rising = column(browser, 3)
    assert rising == sorted(before, key=float) != before
    assert column(browser, 0)[:2] == ["consistency", "boot"]  # whole rows move
    browser.click(header, 3)
    assert column(browser, 3) == rising[::-1]
    browser.click(header, 0)
    assert column(browser, 0) == sorted(column(browser, 0))
    sorts = "return [...document.querySelectorAll('th')].map(t => t.ariaSort)"
    assert [s for s in browser.run(sorts) if s] == ["ascending"]
    browser.click(header, 1)
    assert column(browser, 1) == ["3,000"] * 3 + ["30,000"] * 3  # by number
    # Of single runs one has no figures: it comes last, however they are sorted.
    browser.run("document.querySelector('details').open = true")
    for _ in range(2):
        browser.click("details " + header, 3)
        values = column(browser, 3, table=1)
        assert values[-1] == "–" and "–" not in values[:-1] and len(values) == 12


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("media", ["screen", "print"])
def test_all_text_can_be_read(browser, page, scheme, media):
    browser.open(page, scheme=scheme)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    if media == "screen":
        browser.click("button.sample", 1)
    else:
        preferred = {"name": "prefers-color-scheme", "value": scheme}
        browser.command("Emulation.setEmulatedMedia", media=media, features=[preferred])
    found = browser.run(CONTRASTS)
    assert len(found) > 100
    assert min(found)[0] >= 4.5, min(found)
    paper = browser.run("return getComputedStyle(document.body).backgroundColor")
    dark = scheme == "dark" and media == "screen"
    assert (paper == "rgb(255, 255, 255)") != dark


def test_a_narrow_window_scrolls_tables_and_not_the_page(browser, page):
    browser.open(page, width=360, height=740)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    width = "return document.documentElement.scrollWidth"
    assert browser.run("return innerWidth") == 360
    assert browser.run(width) <= 360
    browser.click("button.sample", 1)
    assert dialog(browser) is not None
    assert browser.run(width) <= 360
    overflow = "const v = document.getElementById('viewer'); "
    assert browser.run(overflow + "return v.scrollWidth - v.clientWidth") == 0
    close = browser.run(
        overflow + "return v.querySelector('.close').getBoundingClientRect().right"
    )
    assert close < 360
    # Nothing of a table is out of reach: it scrolls by itself.
    reach = """
        return [...document.querySelectorAll("table")].filter(t => {
          const box = t.parentElement;
          return t.offsetWidth > box.clientWidth
            && getComputedStyle(box).overflowX !== "auto";
        }).length;
    """
    assert browser.run(reach) == 0
