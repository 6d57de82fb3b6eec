"""Means over seeds, the table and the plots: on cells that are written by hand."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from boot_jax.evaluation import comparison, plots


def cell(method, seed, distance, amount=1.0, failed=None, **changes):
    scores = {
        "frechet_distance": distance,
        "normalized_error": distance / 10,
        "intervals": {"frechet_distance": [distance - 0.1, distance + 0.2]},
    }
    return {
        "method": method,
        "amount": amount,
        "seed": seed,
        "scores": {} if failed else scores,
        "calls": {"teacher": 1_280_000, "student": 640, "images": 0},
        "steps": 5000,
        "seconds": 10.0 + seed,
        "memory": {"bytes": 26_400_000, "how": "compiled training step, per device"},
        "needs_data": False,
        "settings": [f"objective.kind={method}"],
        "failed": failed,
    } | changes


def told(cells, by="calls"):
    teacher = {
        "frechet_distance": 0.1234,
        "intervals": {"frechet_distance": [0.1, 0.2]},
    }
    return {
        "budget": {"by": by, "amounts": sorted({cell["amount"] for cell in cells})},
        "features": "pixels 8x8x1",
        "distance_name": "Fréchet distance",
        "num_images": 2048,
        "data": "some digits",
        "teacher": {
            "ddim": {"1": teacher, "16": teacher},
            "ode": teacher | {"name": "Heun, 80 steps"},
        },
        "cells": cells,
        "methods": comparison.by_method(cells),
        "warnings": ["few images"],
        "device": "1 x cpu",
    }


@pytest.mark.parametrize("values", [(0.2, 0.3), (1.0, 4.0, 2.5), (5.0,) * 4])
def test_an_interval_over_seeds_is_that_of_students_t(values):
    low, high = comparison.seed_interval(values)
    error = stats.sem(values)
    if error > 0:
        expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), error)
        np.testing.assert_allclose((low, high), expected, rtol=1e-12)
    else:
        assert low == high == values[0]


def test_an_interval_over_seeds_covers_as_often_as_it_says():
    drawn = np.random.default_rng(0).normal(3.0, 2.0, (4000, 3))
    ends = np.asarray([comparison.seed_interval(row) for row in drawn])
    covered = (ends[:, 0] <= 3.0) & (ends[:, 1] >= 3.0)
    assert covered.mean() == pytest.approx(0.95, abs=0.012)


def test_one_seed_has_no_interval_over_seeds():
    with pytest.raises(ValueError, match="needs two of them"):
        comparison.seed_interval([1.0])


def test_seeds_become_means_and_failures_are_counted():
    cells = [
        cell("boot", 0, 0.2),
        cell("other", 0, 0.5, failed="step 3: loss = nan"),
        cell("boot", 1, 0.3),
        cell("other", 1, 0.6),
        cell("boot", 2, 9.0, failed="step 7: loss = nan"),
        cell("boot", 0, 0.1, amount=2.0),
        cell("lost", 0, 0.1, failed="step 1: loss = nan"),
    ]
    first, other, doubled, lost = comparison.by_method(cells)
    assert (first["method"], first["amount"], first["num_seeds"]) == ("boot", 1.0, 2)
    assert first["failed"] == 1 and first["seconds"] == 10.5
    figure = first["figures"]["frechet_distance"]
    assert figure["per_seed"] == [0.2, 0.3]
    assert figure["mean"] == pytest.approx(0.25)
    assert figure["interval"] == list(comparison.seed_interval([0.2, 0.3]))
    assert figure["interval_over"] == "seeds"
    figure = other["figures"]["frechet_distance"]
    assert figure["interval"] == [0.5, 0.8] and figure["interval_over"] == "images"
    assert other["figures"]["normalized_error"]["interval"] is None
    assert doubled["amount"] == 2.0 and doubled["failed"] == 0
    assert lost["num_seeds"] == 0 and lost["figures"] == {}
    assert lost["steps"] == 5000


def test_the_table_says_all_of_it():
    cells = [
        cell("boot", 0, 0.2),
        cell("boot", 1, 0.3),
        cell("other", 0, 0.6, needs_data=True),
        cell("other", 1, 0.6, failed="step 3: loss = nan"),
    ]
    text = comparison.markdown(told(cells))
    head, rule, boot, other, *teacher = text.splitlines()
    columns = [part.strip() for part in head.strip("|").split("|")]
    assert columns == [
        *(
            "method",
            "Fréchet distance ↓",
            "normalised error ↓",
            "steps",
            "teacher calls",
        ),
        *("student calls", "real images", "seconds", "memory", "needs data"),
    ]
    assert (
        len({line.count("|") for line in (head, rule, boot, other, *teacher[:3])}) == 1
    )
    low, high = comparison.seed_interval([0.2, 0.3])
    assert f"| boot | 0.250 ({low:.3f} to {high:.3f}) | 0.0250" in boot
    assert boot.endswith("| 5,000 | 1.28 M | 640 | 0 | 10.5 | 26.4 MB | no |")
    assert other.startswith("| other (1 of 2 failed) | 0.600 (0.500 to 0.800)")
    assert other.endswith("| yes |")
    assert "| teacher, 1 DDIM step | 0.123 (0.100 to 0.200) |" in teacher[0]
    assert teacher[2].startswith("| teacher, Heun, 80 steps |")
    for words in (
        "2,048 images, pixels 8x8x1 features, against some digits",
        "1 times the config's network calls",
        "Intervals of 2 seeds: 95 %, Student's t",
        "bootstrap over the images",
        "Failed: other, 1, seed 1: step 3: loss = nan",
        "Warning: few images",
    ):
        assert words in text


def test_the_table_has_a_column_for_several_budgets():
    cells = [cell("boot", 0, 0.4, amount=30), cell("boot", 0, 0.2, amount=60)]
    text = comparison.markdown(told(cells, by="seconds"))
    assert text.startswith("| method | budget (seconds) | Fréchet distance ↓ |")
    assert "| boot | 30 | 0.400" in text and "| boot | 60 | 0.200" in text
    assert "Budget: 30, 60 seconds of training." in text


def image(png):
    with Image.open(io.BytesIO(png)) as opened:
        return np.asarray(opened.convert("RGB"), int)


def test_a_plot_has_a_line_for_each_method_and_for_the_teacher():
    one = plots.Curve([10.0, 20.0], [0.5, 0.3], [[0.4, 0.6], None])
    # Of two seeds an interval may well reach below 0, which a logarithm has not.
    two = plots.Curve([10.0, 20.0], [0.7, 0.4], [[-3.0, 4.4], [0.3, 0.5]])
    teacher = {"teacher, 16 DDIM steps": 0.2}
    arguments = (teacher, "network calls", "pixels 8x8x1")
    alone = image(plots.quality_against_budget({"boot": one}, *arguments))
    both = image(plots.quality_against_budget({"boot": one, "pid": two}, *arguments))
    for shown, colours in ((alone, 1), (both, 2)):
        for index, colour in enumerate(plots.COLOURS[:2]):
            rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            has = (np.abs(shown - rgb).sum(axis=-1) < 12).sum() > 50
            assert has == (index < colours)


def test_methods_of_one_budget_stand_one_below_the_other():
    methods = {
        f"method {index}": plots.Curve([10.0], [0.1 + index], [None])
        for index in range(9)
    }
    many = image(plots.quality_against_budget(methods, {}, "calls", "pixels"))
    few = dict(list(methods.items())[:2])
    assert (
        image(plots.quality_against_budget(few, {}, "calls", "pixels")).shape[0]
        < (many.shape[0])
    )
