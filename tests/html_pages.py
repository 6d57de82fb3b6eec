"""What tests of pages share: a reader of HTML, pictures, and a comparison."""

import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
from PIL import Image

from boot_jax.evaluation import plots
from boot_jax.evaluation.nearest import ShownSample, show_samples

VOID = {"meta", "img", "br", "link", "input", "hr", "col"}

#: What no text of a page may become.
EVIL = "<script>alert('\"&')</script>"


class Page(HTMLParser):
    """Tags with attributes, cells of tables and text; unbalanced tags fail."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        """What the script of the samples shows."""
        (places,) = (
            place
            for place, (_, attrs) in enumerate(
                (tag, attrs) for tag, attrs in self.tags if tag == "script"
            )
            if attrs.get("id") == "neighbours"
        )
        return json.loads(self.scripts[places])


def png(shade: int = 0) -> bytes:
    return plots.encode_png(Image.new("RGB", (4, 3), (shade, shade, shade)))


def shown_rows(
    names: tuple[str, ...] = ("boot", "direct"), captions: tuple[str, ...] = ()
) -> tuple[dict[str, list[ShownSample]], dict[str, np.ndarray], np.ndarray]:
    """Rows of 4 samples, and the samples and 30 real images that they are of."""
    rng = np.random.default_rng(3)
    real = rng.uniform(-1, 1, (30, 5, 5, 1))
    rows = {name: rng.uniform(-1, 1, (4, 5, 5, 1)) for name in names}
    rows[names[0]][1] = real[17]  # a copy
    features = {name: images.reshape(4, -1) for name, images in rows.items()}
    found = show_samples(
        rows, features, real.reshape(30, -1), real.__getitem__, 3, captions
    )
    return found, rows, real


def _scores(distance: float, width: float | None) -> dict[str, Any]:
    scores: dict[str, Any] = {
        "frechet_distance": distance,
        "normalized_error": distance / 10,
        "precision": 0.9,
        "recall": 0.8 - distance,
    }
    if width is not None:
        scores["intervals"] = {
            name: [value - width, value + width] for name, value in scores.items()
        }
    return scores


def _calls(amount: int, images: int) -> dict[str, int]:
    return {"teacher": amount * 2 // 3, "student": amount // 3, "images": images}


def comparison() -> dict[str, Any]:
    """Three methods at two budgets, of two seeds; one cell has failed."""
    cells, methods = [], []
    for method, distance, needs_data in (
        ("boot", 0.30, False),
        ("direct", 0.34, False),
        ("consistency", 0.25, True),
    ):
        for amount in (3000, 30000):
            reached = distance * (1.0 if amount == 30000 else 2.0)
            failed = method == "direct" and amount == 30000
            shared = {
                "method": method,
                "amount": amount,
                "calls": _calls(amount, amount if needs_data else 0),
                "steps": amount // 30,
                "seconds": amount / 500,
                "memory": {"bytes": 12_300_000, "how": "of the compiled step"},
                "needs_data": needs_data,
            }
            for seed in (0, 1):
                lost = failed and seed == 1
                cells.append(
                    shared
                    | {
                        "seed": seed,
                        "settings": [f"objective.kind={method}"],
                        "scores": {} if lost else _scores(reached + 0.01 * seed, 0.02),
                        "failed": "the loss is nan at step 70" if lost else None,
                    }
                )
            scores = _scores(reached, 0.03)
            figures = {
                name: {"mean": value, "interval": scores["intervals"][name]}
                for name, value in scores.items()
                if name != "intervals"
            }
            methods.append(
                shared | {"num_seeds": 2, "figures": figures, "failed": int(failed)}
            )
    return {
        "budget": {"by": "calls", "amounts": [3000, 30000]},
        "features": "pixels 5x5x1",
        "distance_name": "Fréchet distance",
        "num_images": 512,
        "reference": {"count": 30, "image_shape": "5x5x1"},
        "data": "noise, 30 images 5x5x1",
        "warnings": ["few images"],
        "versions": {"jax": "0.10.2"},
        "device": "1 x cpu",
        "teacher": {
            "ddim": {"50": _scores(0.17, 0.02), "1": _scores(0.79, 0.05)},
            "ode": {"name": "Heun, 80 steps", "network_calls": 159}
            | _scores(0.14, 0.02),
        },
        "selftest": {
            "num_images": 500,
            "num_reference": 500,
            "frechet_distance_infinite": 0.001,
            **_scores(0.04, 0.01),
        },
        "cells": cells,
        "methods": methods,
    }
