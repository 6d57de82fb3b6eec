import base64
import json
import os
import re

import pytest
from html_pages import EVIL, Page, png, shown_rows

from boot_jax.evaluation.report import headline, summary_table, write_report


def sampler(distance: float, error: float, seconds: float) -> dict[str, float]:
    return {
        "frechet_distance": distance,
        "normalized_error": error,
        "precision": 0.9,
        "recall": 0.7,
        "seconds_per_image": seconds,
    }


@pytest.fixture
def results() -> dict:
    ddim = {"16": (0.28, 0.006), "1": (9.1, 0.5), "4": (1.12, 0.072), "8": (0.49, 0.02)}
    made = {
        "student": {**sampler(0.331, 0.0623, 2e-5), "variance_ratio": 0.87},
        "teacher": {
            "ddim": {n: sampler(*two, 2e-5 * int(n)) for n, two in ddim.items()},
            "ode": {
                "name": "Heun, 128 steps",
                "frechet_distance": 0.138,
                "precision": 0.9,
                "recall": None,
            },
        },
        "ddim_equivalent_steps": 12.94,
        "ddim_equivalent_steps_censored": "none",
        "features": "pixels 8x8x1",
        "num_images": 1797,
        "data": "digits of scikit-learn",
        "seconds": {"teacher": 61.2, "distill": None},
        "versions": {"jax": "0.10.2"},
        "device": "cpu",
    }
    return json.loads(json.dumps(made))


def written(tmp_path, results, **extra) -> tuple[str, Page]:
    path = tmp_path / "report.html"
    given = {"title": "Digits", "images": {}, "config": {}} | extra
    write_report(path, results=results, **given)
    page = path.read_text(encoding="utf-8")
    return page, Page(page)


# --- the page ---------------------------------------------------------------------


def test_page_is_well_formed_and_needs_no_other_file(tmp_path, results):
    images = {"samples": png(1), "quality": png(2), "loss": png(3)}
    page, parsed = written(tmp_path, results, images=images)
    assert page.startswith("<!DOCTYPE html>")
    names = [tag for tag, _ in parsed.tags]
    assert not {"script", "link", "iframe", "object", "a"} & set(names)
    assert "http:" not in page and "https:" not in page
    assert "url(" not in page and "@import" not in page
    sources = [a["src"] for tag, a in parsed.tags if tag == "img"]
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in sources)
    decoded = [base64.b64decode(source.removeprefix(prefix)) for source in sources]
    assert decoded == list(images.values())
    assert [a["alt"] for tag, a in parsed.tags if tag == "img"] == list(images)


def test_samples_come_before_the_table_and_plots_after_it(tmp_path, results):
    images = {"the samples": png(1), "the plot": png(2)}
    page, _ = written(tmp_path, results, images=images)
    places = [page.index(mark) for mark in ("the samples", "<thead", "the plot")]
    assert places == sorted(places)


def test_page_holds_the_figures(tmp_path, results):
    _, parsed = written(
        tmp_path,
        results,
        config={"seed": 3, "model": {"width": 128, "added": {}}},
        tables={"Ablation": [{"weight": "x0", "FD": 0.5}, {"weight": "dt"}]},
    )
    rows = parsed.rows
    assert [
        "student, 1 step",
        "1",
        "0.331",
        "0.0623",
        "0.900",
        "0.700",
        "0.0200",
    ] in rows
    assert ["teacher, Heun, 128 steps", "–", "0.138", "–", "0.900", "–", "–"] in rows
    teacher = [row[1] for row in rows if "DDIM step" in row[0]]
    assert teacher == ["1", "4", "8", "16"]
    for row in (
        ["model.width", "128"],
        ["model.added", "{}"],
        ["dt", "–"],
        ["x0", "0.5"],
        ["features", "pixels 8x8x1"],
        ["reference data", "digits of scikit-learn"],
        ["student's variance / reference's", "0.870"],
        ["time, teacher", "61.2 s"],
        ["version, jax", "0.10.2"],
    ):
        assert row in rows
    assert headline(results) in parsed.text
    student = [a for tag, a in parsed.tags if tag == "tr" and "class" in a]
    assert student == [{"class": "student"}]


@pytest.fixture
def judged(results) -> dict:
    """With the features of FID, more figures, intervals, a floor and a warning."""
    student = results["student"]
    student |= {"kernel_distance": 0.00123, "inception_score": 2.5, "lpips": 0.0421}
    student["intervals"] = {
        "frechet_distance": [0.31, 0.36],
        "recall": [0.65, 0.75],
        "seconds_per_image": [1.5e-5, 2.5e-5],
    }
    student["kernel_distance_deviation"] = 0.0002
    results["selftest"] = {
        "num_images": 900,
        "num_reference": 897,
        "frechet_distance": 0.021,
        "frechet_distance_infinite": 0.0012,
        "recall": 0.95,
    }
    results |= {"distance_name": "FID", "warnings": ["too few <images>"]}
    results["judges"] = {"lpips": "LPIPS vgg (weights 123)"}
    results["reference"] = {"count": 1797, "image_shape": "8x8x1"}
    return results


def test_page_shows_intervals_the_floor_and_warnings(tmp_path, judged):
    page, parsed = written(tmp_path, judged)
    header = next(row for row in parsed.rows if row and row[0] == "sampler")
    assert header[2:] == [
        *("FID ↓", "normalised error ↓", "precision ↑", "recall ↑", "KID ↓"),
        *("inception score ↑", "LPIPS ↓", "ms per image ↓"),
    ]
    student = next(row for row in parsed.rows if row and row[0] == "student, 1 step")
    assert student[2] == "0.331 (0.310 to 0.360)"
    assert student[5] == "0.700 (0.650 to 0.750)"
    assert student[6:9] == ["0.00123 (± 0.00020 between subsets)", "2.50", "0.0421"]
    assert student[9] == "0.0200 (0.0150 to 0.0250)"
    floor = next(row for row in parsed.rows if row and row[0] == "900 real images")
    assert floor[1:4] == ["–", "0.021", "–"] and floor[5] == "0.950"
    assert "a perfect sampler would get: FID 0.021 with 900 images" in parsed.text
    assert "warning: too few <images>" in parsed.text and "<images>" not in page
    assert ["lpips", "LPIPS vgg (weights 123)"] in parsed.rows
    assert ["reference, count", "1797"] in parsed.rows


def test_the_terminal_says_intervals_below_its_table(judged):
    text = summary_table(judged)
    assert "FID 0.331 (pixels" in text and "FID ↓" in text and "KID ↓" in text
    last = text.splitlines()[-4:]
    assert last[0] == (
        "95 % intervals of the student: FID 0.310 to 0.360, recall 0.650 to 0.750"
    )
    # On the curve of 8 steps at 0.49 and 16 at 0.28.
    assert last[1] == "over the student's interval it is worth 11.7 to 14.1 DDIM steps"
    assert last[2].startswith("a perfect sampler would get: FID 0.021")
    assert last[3] == "warning: too few <images>"


def test_pixels_distances_are_never_called_fid(tmp_path, results):
    page, _ = written(tmp_path, results)
    assert "FID" not in page + summary_table(results)
    assert "KID" not in page


def test_everything_is_escaped(tmp_path, results):
    evil = EVIL
    results |= {
        "features": evil,
        "data": evil,
        "device": evil,
        "versions": {evil: evil},
    }
    results["teacher"]["ode"]["name"] = evil
    page, parsed = written(
        tmp_path,
        results,
        title=evil,
        images={evil: png()},
        config={evil: {evil: evil}},
        tables={evil: [{evil: evil}]},
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == parsed.text.count("<script>") + 1  # the alt
    assert [a["alt"] for tag, a in parsed.tags if tag == "img"] == [evil]
    assert [f"{evil}.{evil}", evil] in parsed.rows


def test_samples_of_the_page_have_their_neighbours(tmp_path, results):
    rows, _, _ = shown_rows(("teacher", EVIL), ("a", "b", EVIL, "d"))
    images = {"the plot": png(2)}
    page, parsed = written(tmp_path, results, images=images, rows=rows)
    assert page.count("<script") == 2  # the data and ours
    assert page.index("sample 1") < page.index("<thead") < page.index("the plot")
    names = [(tag, attrs.get("class")) for tag, attrs in parsed.tags]
    assert names.count(("button", "sample")) == 8 and names.count(("div", "row")) == 2
    samples = parsed.data["samples"]
    assert [sample["caption"] for sample in samples] == ["a", "b", EVIL, "d"] * 2
    assert samples[4]["title"] == f"{EVIL}: sample 1"
    copied, place = samples[1], samples[1]["near"][0][0]
    assert copied["near"][0] == [place, "real image 17, distance 0.000"]
    assert "no real image has another as near" in copied["told"]
    sources = [a["src"] for tag, a in parsed.tags if tag == "img" and "src" in a]
    assert parsed.data["images"][place] == sources[1]  # the copy, to the pixel


def test_samples_without_neighbours_are_plain_and_say_why(tmp_path, results):
    rows, _, _ = shown_rows()
    plain = {
        name: [type(sample)(image=sample.image) for sample in samples]
        for name, samples in rows.items()
    }
    note = "No neighbours are shown: the config names no <data>."
    page, parsed = written(tmp_path, results, rows=plain, note=note)
    assert note in parsed.text and "<data>" not in page
    names = [(tag, attrs.get("class")) for tag, attrs in parsed.tags]
    assert names.count(("span", "sample")) == 8
    assert not {"button", "dialog"} & {tag for tag, _ in parsed.tags}


@pytest.mark.parametrize("results", [{}, {"student": None, "teacher": {"ddim": None}}])
def test_missing_results_are_dashes(tmp_path, results):
    _, parsed = written(tmp_path, results)
    assert ["student, 1 step", "1", *["–"] * 5] in parsed.rows
    assert ["features", "–"] in parsed.rows
    assert "were not scored" in summary_table(results)


def test_a_diverged_student_is_not_hidden(tmp_path, results):
    results["student"]["normalized_error"] = float("nan")
    _, parsed = written(tmp_path, results)
    assert any(row[0] == "student, 1 step" and row[3] == "nan" for row in parsed.rows)


def test_images_must_be_png(tmp_path, results):
    with pytest.raises(ValueError, match="'samples' must be the bytes of a PNG"):
        written(tmp_path, results, images={"samples": b"\xff\xd8 jpeg"})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_report(tmp_path, results, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        written(tmp_path, results)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- the terminal -----------------------------------------------------------------


def test_terminal_table_is_aligned_and_says_what_the_page_says(tmp_path, results):
    first, blank, *table = summary_table(results).splitlines()
    assert first == headline(results) and blank == ""
    spans = [match.span() for match in re.finditer("-+", table[2])]
    assert len(spans) == 7
    width = spans[-1][1]
    cells = []
    for line in table[:2] + table[3:]:
        padded = line.ljust(width)
        assert len(padded) == width
        cut = [padded[start:stop] for start, stop in spans]
        assert "  ".join(cut) == padded  # nothing between the columns
        assert all(cell == cell.strip().rjust(len(cell)) for cell in cut[1:])
        assert cut[0] == cut[0].strip().ljust(len(cut[0]))
        cells.append([cell.strip() for cell in cut])
    _, parsed = written(tmp_path, results)
    body = cells[2:]
    assert len(body) == 6
    assert body == [row for row in parsed.rows if row in body]
    header = [f"{top} {bottom}".strip() for top, bottom in zip(*cells[:2], strict=True)]
    assert header == parsed.rows[0]


def test_headline_compares_with_a_measured_run_that_is_no_better(results):
    assert headline(results) == (
        "One step of the student: Fréchet distance 0.331 (pixels 8x8x1 features, "
        "1,797 images), as good as 12.9 steps of the teacher's DDIM and 8.0 times as "
        "fast as 8 of its steps."
    )


@pytest.mark.parametrize(
    ("value", "censored", "end"),
    [
        (
            16.0,
            "above",
            "better than the teacher's DDIM with up to 16 steps "
            "and 16.0 times as fast as 16 of its steps.",
        ),
        (1.0, "below", "not as good as 1 step of the teacher's DDIM."),
        (4.0, "below", "not as good as 4 steps of the teacher's DDIM."),
        (1.3, "none", "as good as 1.3 steps of the teacher's DDIM."),
    ],
)
def test_headline_claims_no_more_than_was_measured(results, value, censored, end):
    results["ddim_equivalent_steps"] = value
    results["ddim_equivalent_steps_censored"] = censored
    assert headline(results).endswith(f"images), {end}")


def test_headline_without_times_or_steps(results):
    del results["student"]["seconds_per_image"]
    assert headline(results).endswith("as good as 12.9 steps of the teacher's DDIM.")
    del results["ddim_equivalent_steps"], results["num_images"], results["features"]
    assert headline(results) == "One step of the student: Fréchet distance 0.331."
