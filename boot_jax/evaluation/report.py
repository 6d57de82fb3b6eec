"""What a run is worth, on one page: a self-contained HTML file, and a terminal table.

Both are made of ``results``, a nested dict that JSON can hold. Any part may be missing
or None, and is then shown as an en dash::

    {"student": {"frechet_distance", "normalized_error", "precision", "recall",
                 "variance_ratio", "seconds_per_image"},
     "teacher": {"ddim": {"1": {the same, but variance_ratio}, "2": {...}, ...},
                 "ode": {the same, "name": "Heun, 128 steps", "network_calls": 255}},
     "ddim_equivalent_steps": 10.3, "ddim_equivalent_steps_censored": "none",
     "features": "pixels 8x8x1", "distance_name": "Fréchet distance",
     "num_images": 1797, "data": "where from", "warnings": ["..."],
     "judges": {"lpips": "which network"}, "reference": {its provenance},
     "selftest": {the figures of sets, "num_images", "num_reference",
                  "frechet_distance_infinite"},
     "seconds": {"teacher": 60.0, ...}, "versions": {"jax": ...}, "device": "..."}

Each set of figures may have more of `MORE_FIGURES`, and ``intervals``, a figure's name
to the ends of its 95 % interval.
"""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from boot_jax.evaluation import metrics, pages, sample_rows, selftest
from boot_jax.evaluation.figures import (
    Column,
    columns_of,
    figure_cell,
    milliseconds,
    number,
)
from boot_jax.evaluation.metrics import EquivalentSteps
from boot_jax.evaluation.nearest import ShownSample
from boot_jax.evaluation.pages import EN_DASH, Cell


def _columns(results: Mapping[str, Any]) -> dict[str, Column]:
    """The figures to show."""
    return columns_of(results.get("distance_name"), results.get("student") or {})


def _header(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    figures = [(column.above, column.below) for column in _columns(results).values()]
    return [("", "sampler"), ("network", "calls"), *figures, ("ms per", "image ↓")]


def _row(
    label: str,
    calls: object,
    scores: Mapping[str, Any],
    columns: Mapping[str, Column],
) -> list[Cell]:
    return [
        Cell(label),
        Cell(EN_DASH if calls is None else str(calls)),
        *(figure_cell(scores, name, column.form) for name, column in columns.items()),
        _time_cell(scores),
    ]


def _time_cell(scores: Mapping[str, Any]) -> Cell:
    interval = (scores.get("intervals") or {}).get("seconds_per_image") or ()
    ends = " to ".join(map(milliseconds, interval))
    return Cell(milliseconds(scores.get("seconds_per_image")), ends)


def _ddim(results: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    entries = (results.get("teacher") or {}).get("ddim") or {}
    return {int(steps): entries[steps] for steps in sorted(entries, key=int)}


def _rows(results: Mapping[str, Any]) -> list[list[Cell]]:
    """The student first, the teacher's DDIM by steps, its ODE, and real images."""
    found: list[tuple[str, object, Mapping[str, Any]]] = [
        ("student, 1 step", 1, results.get("student") or {})
    ]
    for steps, figures in (results.get("student_steps") or {}).items():
        found.append((f"student, {steps} steps", int(steps), figures))
    for steps, figures in _ddim(results).items():
        plural = "step" if steps == 1 else "steps"
        found.append((f"teacher, {steps} DDIM {plural}", steps, figures))
    if ode := (results.get("teacher") or {}).get("ode"):
        name = ode.get("name") or "ODE"
        found.append((f"teacher, {name}", ode.get("network_calls"), ode))
    if real := results.get("selftest"):
        found.append((f"{real['num_images']} real images", None, real))
    columns = _columns(results)
    return [_row(*row, columns) for row in found]


def _notes(results: Mapping[str, Any]) -> list[str]:
    """What is to be said below the table, a line each."""
    notes = []
    if found := results.get("selftest"):
        name = results.get("distance_name") or "Fréchet distance"
        notes.append(selftest.sentence(found, name))
    return notes + [f"warning: {text}" for text in results.get("warnings") or ()]


def _interval_lines(results: Mapping[str, Any]) -> list[str]:
    """The student's intervals, for the terminal, whose table has no room for them."""
    intervals = (results.get("student") or {}).get("intervals") or {}
    shown = [
        f"{column.name} {low:{column.form}} to {high:{column.form}}"
        for name, column in _columns(results).items()
        if name in intervals
        for low, high in [intervals[name]]
    ]
    return [f"95 % intervals of the student: {', '.join(shown)}"] if shown else []


def _worth(results: Mapping[str, Any]) -> list[str]:
    """The DDIM steps that the ends of the student's interval are worth."""
    student = results.get("student") or {}
    interval = (student.get("intervals") or {}).get("frechet_distance")
    curve = {
        steps: scores["frechet_distance"]
        for steps, scores in _ddim(results).items()
        if scores.get("frechet_distance") is not None
    }
    if not interval or not curve:
        return []
    low, high = (
        metrics.equivalent_steps(list(curve), list(curve.values()), end)
        for end in reversed(interval)
    )
    return [f"over the student's interval it is worth {low} to {high} DDIM steps"]


def _equivalent(results: Mapping[str, Any]) -> EquivalentSteps | None:
    value = results.get("ddim_equivalent_steps")
    censored = results.get("ddim_equivalent_steps_censored") or "none"
    return None if value is None else EquivalentSteps(value, censored)


def _quality(equal: EquivalentSteps) -> str:
    steps = f"{equal.value:.1f}".removesuffix(".0")
    counted = f"{steps} {'step' if steps == '1' else 'steps'}"
    return {
        "none": f"as good as {counted} of the teacher's DDIM",
        "above": f"better than the teacher's DDIM with up to {counted}",
        "below": f"not as good as {counted} of the teacher's DDIM",
    }[equal.censored]


def _speed(results: Mapping[str, Any], equal: EquivalentSteps) -> list[str]:
    """How much faster than the longest measured DDIM run that is no better, if any."""
    own = (results.get("student") or {}).get("seconds_per_image")
    ddim = _ddim(results)
    matched = [
        steps
        for steps in ddim
        if 1 < steps <= equal.value and ddim[steps].get("seconds_per_image")
    ]
    if equal.censored == "below" or not own or not matched:
        return []
    factor = ddim[matched[-1]]["seconds_per_image"] / own
    return [f"{factor:.1f} times as fast as {matched[-1]} of its steps"]


def headline(results: Mapping[str, Any]) -> str:
    """The result in a sentence: distance, the DDIM steps it is worth, and the speed."""
    distance = (results.get("student") or {}).get("frechet_distance")
    if distance is None:
        return "The student's one-step samples were not scored."
    about = [f"{results['features']} features"] if results.get("features") else []
    if results.get("num_images"):
        about.append(f"{results['num_images']:,} images")
    within = f" ({', '.join(about)})" if about else ""
    name = results.get("distance_name") or "Fréchet distance"
    sentence = f"One step of the student: {name} {distance:.3f}{within}"
    if equal := _equivalent(results):
        claims = [_quality(equal), *_speed(results, equal)]
        sentence = f"{sentence}, {' and '.join(claims)}"
    return f"{sentence}."


def summary_table(results: Mapping[str, Any]) -> str:
    """The headline, and the table of samplers as text of fixed width.

    Args:
      results: see the module's text.
    """
    rows = [list(line) for line in zip(*_header(results), strict=True)]
    rows += [[cell.text for cell in row] for row in _rows(results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(2, ["-" * width for width in widths])
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    below = [*_interval_lines(results), *_worth(results), *_notes(results)]
    return "\n".join([headline(results), "", *lines, *([""] if below else []), *below])


def _facts(results: Mapping[str, Any]) -> dict[str, object]:
    ratio = (results.get("student") or {}).get("variance_ratio")
    facts: dict[str, object] = {
        "features": results.get("features"),
        "images scored": results.get("num_images"),
        "reference data": results.get("data"),
        "student's variance / reference's": number(ratio, ".3f"),
        "device": results.get("device"),
    }
    for name, judge in (results.get("judges") or {}).items():
        facts[name.replace("_", " ")] = judge
    for name, value in (results.get("reference") or {}).items():
        facts[f"reference, {name.replace('_', ' ')}"] = value
    for phase, seconds in (results.get("seconds") or {}).items():
        facts[f"time, {phase}"] = f"{number(seconds, '.1f')} s"
    for package, version in (results.get("versions") or {}).items():
        facts[f"version, {package}"] = version
    return {name: EN_DASH if v is None else v for name, v in facts.items()}


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    results: Mapping[str, Any],
    images: Mapping[str, bytes],
    config: Mapping[str, Any],
    rows: Mapping[str, Sequence[ShownSample]] | None = None,
    note: str = "",
    tables: Mapping[str, Sequence[Mapping[str, object]]] | None = None,
) -> None:
    """Writes the report: one HTML file that needs no other, whole or not at all.

    Args:
      path: the file; its folder must exist, and an older report there is replaced.
      title: plain text, as are all captions and values.
      results: see the module's text.
      images: caption -> PNG bytes; without ``rows`` the first stands at the top.
      config: the run's, nested; shown with dotted names.
      rows: name -> samples of one size; each can be looked at beside its neighbours.
      note: said below them, for instance why there are no neighbours.
      tables: caption -> rows, each a mapping with the columns of the first.

    Raises:
      ValueError: an image that is not a PNG.
    """
    figures = [pages.figure(caption, png) for caption, png in images.items()]
    about = f"Distances in {results.get('features') or 'unnamed'} features"
    body = [f'<p class="headline">{escape(headline(results))}</p>']
    samples = [sample_rows.section(rows)] if rows else figures[:1]
    plots = figures if rows else figures[1:]
    if samples:
        body += ["<h2>Samples</h2>", *samples]
    body += [f'<p class="quiet">{escape(note)}</p>'] if note else []
    header = [" ".join(lines).strip() for lines in _header(results)]
    body += ["<h2>Student and teacher</h2>", pages.table(header, _rows(results), about)]
    notes = [*_worth(results), *_notes(results)]
    body += [f'<p class="quiet">{escape(text)}</p>' for text in notes]
    for caption, lines in (tables or {}).items():
        columns = list(lines[0]) if lines else []
        cells = [[line.get(column, EN_DASH) for column in columns] for line in lines]
        body.append(pages.table(columns, cells, caption))
    if plots:
        body += ['<div class="plots">', "<h2>Plots</h2>", *plots, "</div>"]
    body += ["<h2>How it was measured</h2>", pages.pairs(_facts(results))]
    body.append(pages.folded("Configuration", pages.pairs(pages.flattened(config))))
    style, script = (sample_rows.STYLE, sample_rows.SCRIPT) if rows else ("", "")
    pages.write_atomically(Path(path), pages.page(title, body, style, script))
