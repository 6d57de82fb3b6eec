"""Methods of distillation side by side, on one page: what they reach for a budget.

It is made of ``comparison``, a nested dict that JSON can hold. Any part may be missing
or None, and is then shown as an en dash::

    {"budget": {"by": "calls" | "seconds" | "steps", "amounts": [...]},
     "features", "distance_name", "num_images", "reference", "data", "warnings",
     "versions", "device", "selftest",
     "teacher": {"ddim": {...}, "ode": {...}},  # these as in `report`
     "cells": [{"method", "amount", "seed", "scores": {figures, "intervals": {...}},
                "calls": {"teacher", "student", "images", "auxiliary"},
                "steps", "seconds",
                "memory": {"bytes", "how"}, "needs_data", "settings": [...],
                "failed": None | "reason"}],
     "methods": [{"method", "amount", "num_seeds", "failed": how many,
                  "figures": {name: {"mean", "interval": [low, high], "per_seed"}},
                  "calls", "steps", "seconds", "memory", "needs_data"}]}
"""

import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from boot_jax.evaluation import pages, sample_rows, selftest
from boot_jax.evaluation.comparison import UNITS, Unit
from boot_jax.evaluation.figures import Column, cell_of, columns_of, figure_cell
from boot_jax.evaluation.nearest import ShownSample
from boot_jax.evaluation.pages import EN_DASH, Cell

_UNKNOWN = Unit("units of the budget", "units", "budget")

_DISTANCE = "frechet_distance"


def _unit(comparison: Mapping[str, Any]) -> Unit:
    by = (comparison.get("budget") or {}).get("by")
    return UNITS.get(str(by), _UNKNOWN)


def _distance(method: Mapping[str, Any]) -> float:
    """The mean distance; infinity where there is none, or none that is finite."""
    value = ((method.get("figures") or {}).get(_DISTANCE) or {}).get("mean")
    return value if value is not None and math.isfinite(value) else math.inf


def _interval(method: Mapping[str, Any]) -> Sequence[float] | None:
    return method["figures"][_DISTANCE].get("interval")


def _with_distance(method: Mapping[str, Any]) -> str:
    """For instance ``0.213 (0.200 to 0.230, 3 seeds)``."""
    about = []
    if interval := _interval(method):
        about.append(f"{interval[0]:.3f} to {interval[1]:.3f}")
    if seeds := method.get("num_seeds"):
        about.append(f"{seeds} {'seed' if seeds == 1 else 'seeds'}")
    told = f" ({', '.join(about)})" if about else ""
    return f"{_distance(method):.3f}{told}"


def _certainty(best: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    first, second = _interval(best), _interval(other)
    if not first or not second:
        return "without intervals of both, the order may be chance"
    if max(first[0], second[0]) <= min(first[1], second[1]):
        return "their intervals overlap, so the order may be chance"
    return "their intervals do not overlap"


def headline(comparison: Mapping[str, Any]) -> str:
    """Which method has the lowest distance at the largest budget, and how surely."""
    methods = comparison.get("methods") or []
    amounts = [method["amount"] for method in methods]
    if not amounts:
        return "No method was compared."
    largest = max(amounts)
    there = [method for method in methods if method["amount"] == largest]
    ranked = sorted((m for m in there if _distance(m) < math.inf), key=_distance)
    budget = f"With {largest:,g} {_unit(comparison).amount} each"
    if not ranked:
        return f"{budget}, no method has a distance."
    best, *others = ranked
    name = comparison.get("distance_name") or "Fréchet distance"
    if not others:
        alone = f"{budget}, only {best['method']} has a {name}"
        return f"{alone}: {_with_distance(best)}."
    sentences = [
        f"{budget}, {best['method']} has the lowest {name}, {_with_distance(best)}; "
        f"next is {others[0]['method']}, {_with_distance(others[0])}: "
        f"{_certainty(best, others[0])}."
    ]
    free = [method for method in ranked if method.get("needs_data") is False]
    if best.get("needs_data") and free:
        sentences.append(
            f"{best['method']} needs data; of those that need none, "
            f"{free[0]['method']} has the lowest, {_with_distance(free[0])}."
        )
    return " ".join([*sentences, *_of_the_teacher(comparison)])


def _of_the_teacher(comparison: Mapping[str, Any]) -> list[str]:
    """What its longest DDIM run reaches."""
    ddim = (comparison.get("teacher") or {}).get("ddim") or {}
    steps = max(ddim, key=int, default=None)
    if steps is None or ddim[steps].get(_DISTANCE) is None:
        return []
    return [f"{steps} steps of the teacher's DDIM have {ddim[steps][_DISTANCE]:.3f}."]


def _failures(comparison: Mapping[str, Any]) -> list[str]:
    """A line for each cell that came to nothing."""
    unit = _unit(comparison).amount
    return [
        f"failed: {cell['method']} with {cell['amount']:,g} {unit}, "
        f"seed {cell.get('seed', EN_DASH)}: {cell['failed']}"
        for cell in comparison.get("cells") or ()
        if cell.get("failed")
    ]


def _count(value: float | None, form: str = ",.0f") -> Cell:
    return cell_of(value, None, form)


def _calls(calls: Mapping[str, Any] | None) -> Cell:
    found = [(calls or {}).get(name) for name in ("teacher", "student")]
    if auxiliary := (calls or {}).get("auxiliary"):
        found.append(auxiliary)
    counted = [count for count in found if count is not None]
    if not counted:
        return Cell(EN_DASH)
    apart = " + ".join(EN_DASH if c is None else f"{c:,.0f}" for c in found)
    return Cell(f"{sum(counted):,.0f}", apart, sum(counted))


def _memory(memory: Mapping[str, Any] | None) -> Cell:
    size = (memory or {}).get("bytes")
    return cell_of(None if size is None else size / 1e6, None, ",.0f")


def _words(text: str) -> Cell:
    return Cell(text or EN_DASH, key=text or None)


def _costs(row: Mapping[str, Any]) -> list[Cell]:
    return [
        _calls(row.get("calls")),
        _count(row.get("steps")),
        _count(row.get("seconds"), ",.1f"),
        _memory(row.get("memory")),
        _count((row.get("calls") or {}).get("images")),
        _words({True: "yes", False: "no", None: ""}[row.get("needs_data")]),
    ]


_COSTS = (
    "calls, teacher + student (+ auxiliary)",
    "steps",
    "seconds",
    "memory, MB",
    "images read",
    "needs data",
)


def _columns(comparison: Mapping[str, Any]) -> dict[str, Column]:
    there = {
        name
        for method in comparison.get("methods") or ()
        for name in method.get("figures") or ()
    }
    return columns_of(comparison.get("distance_name"), there)


def _method_rows(comparison: Mapping[str, Any]) -> list[list[Cell]]:
    """The methods, the largest budget first and the lowest distance first in it."""
    columns, rows = _columns(comparison), []
    methods = comparison.get("methods") or []
    for method in sorted(methods, key=lambda m: (-m["amount"], _distance(m))):
        figures, failed = method.get("figures") or {}, method.get("failed")
        cells = []
        for name, column in columns.items():
            found = figures.get(name) or {}
            cells.append(cell_of(found.get("mean"), found.get("interval"), column.form))
        seeds = _count(method.get("num_seeds"))
        rows.append(
            [
                _words(str(method["method"])),
                _count(method["amount"], ",g"),
                seeds._replace(interval=f"{failed} failed") if failed else seeds,
                *cells,
                *_costs(method),
            ]
        )
    return rows


def _other_rows(comparison: Mapping[str, Any]) -> list[list[Cell]]:
    """The teacher's DDIM by steps, its ODE, and real images."""
    columns, teacher = _columns(comparison), comparison.get("teacher") or {}
    found: list[tuple[str, object, Mapping[str, Any]]] = []
    ddim = teacher.get("ddim") or {}
    for steps in sorted(ddim, key=int):
        plural = "step" if int(steps) == 1 else "steps"
        found.append((f"teacher, {steps} DDIM {plural}", int(steps), ddim[steps]))
    if ode := teacher.get("ode"):
        name = ode.get("name") or "ODE"
        found.append((f"teacher, {name}", ode.get("network_calls"), ode))
    if real := comparison.get("selftest"):
        found.append((f"{real['num_images']} real images", None, real))
    return [
        [
            Cell(label),
            Cell(EN_DASH if calls is None else f"{calls:,}"),
            *(figure_cell(own, name, column.form) for name, column in columns.items()),
        ]
        for label, calls, own in found
    ]


def _cell_rows(comparison: Mapping[str, Any]) -> list[list[Cell]]:
    columns, rows = _columns(comparison), []
    for cell in comparison.get("cells") or ():
        scores = cell.get("scores") or {}
        rows.append(
            [
                _words(str(cell["method"])),
                _count(cell["amount"], ",g"),
                _count(cell.get("seed")),
                *(figure_cell(scores, name, c.form) for name, c in columns.items()),
                *_costs(cell),
                _words(", ".join(map(str, cell.get("settings") or ()))),
                _words(str(cell.get("failed") or "")),
            ]
        )
    return rows


def _facts(comparison: Mapping[str, Any]) -> dict[str, object]:
    ways = {
        str(memory["how"])
        for row in comparison.get("cells") or ()
        if (memory := row.get("memory") or {}).get("how")
    }
    amounts = (comparison.get("budget") or {}).get("amounts") or ()
    facts: dict[str, object] = {
        "budgets": f"{', '.join(f'{n:,g}' for n in amounts)} {_unit(comparison).amount}"
        if amounts
        else None,
        "features": comparison.get("features"),
        "images scored": comparison.get("num_images"),
        "reference data": comparison.get("data"),
        "memory": "; ".join(sorted(ways)) or None,
        "device": comparison.get("device"),
    }
    for name, value in (comparison.get("reference") or {}).items():
        facts[f"reference, {name.replace('_', ' ')}"] = value
    for package, version in (comparison.get("versions") or {}).items():
        facts[f"version, {package}"] = version
    return {name: EN_DASH if v is None else v for name, v in facts.items()}


def _notes(comparison: Mapping[str, Any]) -> list[str]:
    notes = _failures(comparison)
    if found := comparison.get("selftest"):
        name = comparison.get("distance_name") or "Fréchet distance"
        notes.append(selftest.sentence(found, name))
    return notes + [f"warning: {text}" for text in comparison.get("warnings") or ()]


def write_comparison(
    path: str | os.PathLike[str],
    *,
    title: str,
    comparison: Mapping[str, Any],
    images: Mapping[str, bytes],
    rows: Mapping[str, Sequence[ShownSample]],
    config: Mapping[str, Any],
    note: str = "",
) -> None:
    """Writes the page: one HTML file that needs no other, whole or not at all.

    Args:
      path: the file; its folder must exist, and an older page there is replaced.
      title: plain text, as are all captions and values.
      comparison: see the module's text.
      images: caption -> PNG bytes, of plots.
      rows: name -> samples of one size; each can be looked at beside its neighbours.
      config: nested; shown with dotted names.
      note: said below the samples, for instance why there are no neighbours.

    Raises:
      ValueError: an image that is not a PNG.
    """
    figures = [column.title for column in _columns(comparison).values()]
    about = f"Distances in {comparison.get('features') or 'unnamed'} features"
    budget = _unit(comparison).column
    header = ["method", f"budget, {budget}", "seeds", *figures, *_COSTS]
    told = (
        f"{about}; below each figure its 95 % interval. All samples are of one step. "
        "A click on a column's name sorts."
    )
    body = [f'<p class="headline">{escape(headline(comparison))}</p>']
    body.append("<h2>Methods</h2>")
    body.append(pages.table(header, _method_rows(comparison), told, sortable=True))
    body += [f'<p class="quiet">{escape(text)}</p>' for text in _notes(comparison)]
    if others := _other_rows(comparison):
        header = ["sampler", "network calls", *figures]
        body += ["<h2>Teacher and real images</h2>", pages.table(header, others, about)]
    if images:
        drawn = [pages.figure(caption, png) for caption, png in images.items()]
        body += ["<h2>Plots</h2>", '<div class="plots">', *drawn, "</div>"]
    if rows:
        body += ["<h2>Samples</h2>", sample_rows.section(rows)]
    body += [f'<p class="quiet">{escape(note)}</p>'] if note else []
    header = ["method", f"budget, {budget}", "seed", *figures, *_COSTS]
    header += ["settings", "failed"]
    cells = pages.table(header, _cell_rows(comparison), about, sortable=True)
    body += ["<h2>How it was measured</h2>", pages.pairs(_facts(comparison))]
    body.append(pages.folded("Every single run", cells))
    body.append(pages.folded("Configuration", pages.pairs(pages.flattened(config))))
    style, script = pages.SORT_STYLE, pages.SORT_SCRIPT
    if rows:
        style, script = style + sample_rows.STYLE, script + sample_rows.SCRIPT
    pages.write_atomically(Path(path), pages.page(title, body, style, script))
