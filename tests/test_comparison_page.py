import re

import pytest
from html_pages import EVIL, Page, comparison, png, shown_rows

from boot_jax.evaluation.comparison_page import headline, write_comparison


def written(tmp_path, found, **extra) -> tuple[str, Page]:
    path = tmp_path / "comparison.html"
    given = {"title": "Digits", "images": {}, "rows": {}, "config": {}} | extra
    write_comparison(path, comparison=found, **given)
    page = path.read_text(encoding="utf-8")
    return page, Page(page)


def method(found: dict, name: str, amount: int) -> dict:
    (one,) = (
        row
        for row in found["methods"]
        if (row["method"], row["amount"]) == (name, amount)
    )
    return one


def test_the_page_needs_no_other_file(tmp_path):
    rows, _, _ = shown_rows()
    images = {"quality": png(1), "error": png(2)}
    page, parsed = written(tmp_path, comparison(), images=images, rows=rows)
    assert "http:" not in page and "https:" not in page and "url(" not in page
    assert not {"link", "iframe", "object", "a"} & {tag for tag, _ in parsed.tags}
    assert all("src" not in attrs for tag, attrs in parsed.tags if tag == "script")
    sources = [a["src"] for tag, a in parsed.tags if "src" in a]
    assert all(source.startswith("data:image/") for source in sources)
    assert len(parsed.data["samples"]) == 8


def test_every_figure_has_its_interval(tmp_path):
    _, parsed = written(tmp_path, comparison())
    interval = re.compile(r"^[\d.]+ \(-?[\d.]+ to -?[\d.]+\)$")
    header = parsed.rows[0]
    assert header[:7] == [
        *("method", "budget, times its calls", "seeds", "Fréchet distance ↓"),
        *("normalised error ↓", "precision ↑", "recall ↑"),
    ]
    methods = parsed.rows[1:7]
    assert [(row[0], row[1]) for row in methods] == [
        *(("consistency", "30,000"), ("boot", "30,000"), ("direct", "30,000")),
        *(("consistency", "3,000"), ("boot", "3,000"), ("direct", "3,000")),
    ]
    assert all(interval.match(cell) for row in methods for cell in row[3:7])
    assert methods[1] == [
        *("boot", "30,000", "2", "0.300 (0.270 to 0.330)"),
        *("0.0300 (0.0000 to 0.0600)", "0.900 (0.870 to 0.930)"),
        *("0.500 (0.470 to 0.530)", "30,000 (20,000 + 10,000)"),
        *("1,000", "60.0", "12", "0", "no"),
    ]
    assert methods[2][2] == "2 (1 failed)"
    assert methods[0][-2:] == ["30,000", "yes"]
    beside = [
        row for row in parsed.rows if row[0].startswith("teacher") or "real" in row[0]
    ]
    assert [row[:2] for row in beside] == [
        *(["teacher, 1 DDIM step", "1"], ["teacher, 50 DDIM steps", "50"]),
        *(["teacher, Heun, 80 steps", "159"], ["500 real images", "–"]),
    ]
    assert all(interval.match(cell) for row in beside for cell in row[2:])


def test_single_runs_are_there_with_what_failed(tmp_path):
    _, parsed = written(tmp_path, comparison())
    reason = "the loss is nan at step 70"
    assert (
        f"failed: direct with 30,000 times the config's network calls, seed 1: {reason}"
        in parsed.text
    )
    single = [row for row in parsed.rows if row[-2:-1] == ["objective.kind=direct"]]
    assert [row[-1] for row in single] == ["–", "–", "–", reason]
    assert single[-1][3:7] == ["–"] * 4
    for row in (
        ["memory", "of the compiled step"],
        ["reference, count", "30"],
        ["budgets", "3,000, 30,000 times the config's network calls"],
    ):
        assert row in parsed.rows
    assert "a perfect sampler would get: Fréchet distance 0.04" in parsed.text
    assert "warning: few images" in parsed.text


def test_the_headline_says_how_sure_the_order_is():
    found = comparison()
    assert headline(found) == (
        "With 30,000 times the config's network calls each, consistency has the "
        "lowest Fréchet distance, "
        "0.250 (0.220 to 0.280, 2 seeds); next is boot, 0.300 (0.270 to 0.330, 2 "
        "seeds): their intervals overlap, so the order may be chance. consistency "
        "needs data; of those that need none, boot has the lowest, 0.300 (0.270 to "
        "0.330, 2 seeds). 50 steps of the teacher's DDIM have 0.170."
    )
    boot = method(found, "boot", 30000)["figures"]["frechet_distance"]
    boot["interval"] = [0.281, 0.33]
    assert "their intervals do not overlap." in headline(found)
    del boot["interval"]
    assert "without intervals of both, the order may be chance." in headline(found)
    # Less at a smaller budget is no claim.
    method(found, "direct", 3000)["figures"]["frechet_distance"]["mean"] = 0.01
    assert headline(found).startswith(
        "With 30,000 times the config's network calls each, consistency"
    )
    boot["mean"] = 0.2
    assert "boot has the lowest Fréchet distance, 0.200 (2 seeds)" in headline(found)
    assert "needs data" not in headline(found)


@pytest.mark.parametrize("mean", [None, float("nan")])
def test_a_method_that_came_to_nothing_is_never_the_best(tmp_path, mean):
    found = comparison()
    best = method(found, "consistency", 30000)["figures"]["frechet_distance"]
    best["mean"] = mean
    assert "boot has the lowest Fréchet distance" in headline(found)
    method(found, "direct", 30000)["figures"] = {}
    assert headline(found).startswith(
        "With 30,000 times the config's network calls each, only boot has a Fréchet "
        "distance: 0.300"
    )
    method(found, "boot", 30000)["figures"] = {}
    assert "no method has a distance" in headline(found)
    _, parsed = written(tmp_path, found)
    assert ["–"] * 4 in [row[3:7] for row in parsed.rows[1:7]]


def test_missing_parts_are_dashes(tmp_path):
    _, parsed = written(tmp_path, {})
    assert "No method was compared." in parsed.text
    assert ["device", "–"] in parsed.rows
    least = {"method": "boot", "amount": 5}
    _, parsed = written(tmp_path, {"methods": [least], "cells": [least]})
    assert parsed.rows[1] == ["boot", "5", *["–"] * 11]


def test_everything_is_escaped(tmp_path):
    rows, _, _ = shown_rows((EVIL,), (EVIL, "", "", ""))
    found = comparison()
    for part in (*found["cells"], *found["methods"]):
        part |= {"method": EVIL, "settings": [EVIL]}
    found["cells"][0]["failed"] = EVIL
    found |= {"warnings": [EVIL], "features": EVIL, "versions": {EVIL: EVIL}}
    page, parsed = written(
        tmp_path,
        found,
        title=EVIL,
        images={EVIL: png()},
        rows=rows,
        config={EVIL: EVIL},
        note=EVIL,
    )
    assert page.count("<script") == 2  # the data and ours
    assert parsed.rows[1][0] == EVIL and [EVIL, EVIL] in parsed.rows
    assert f"warning: {EVIL}" in parsed.text


def test_images_must_be_png(tmp_path):
    with pytest.raises(ValueError, match="'plot' must be the bytes of a PNG"):
        written(tmp_path, comparison(), images={"plot": b"GIF89a"})
    assert list(tmp_path.iterdir()) == []
