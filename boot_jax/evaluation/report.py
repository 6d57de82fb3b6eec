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

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from boot_jax.evaluation import selftest
from boot_jax.evaluation.metrics import EquivalentSteps

EN_DASH = "–"

# Figures of the table: headers of two lines, which keep the terminal's narrow, and how
# many decimals.
_FIGURES = {
    "frechet_distance": ("Fréchet", "distance ↓", ".3f"),
    "normalized_error": ("normalised", "error ↓", ".4f"),
    "precision": ("", "precision ↑", ".3f"),
    "recall": ("", "recall ↑", ".3f"),
}

#: Figures with a column only where the student has them.
MORE_FIGURES = {
    "density": ("", "density ↑", ".3f"),
    "coverage": ("", "coverage ↑", ".3f"),
    "kernel_distance": ("kernel", "distance ↓", ".5f"),
    "spatial_frechet_distance": ("spatial", "Fréchet ↓", ".3f"),
    "inception_score": ("inception", "score ↑", ".2f"),
    "mean_pairwise_distance": ("pairwise", "distance", ".3f"),
    "recall_of_teacher": ("recall of", "teacher ↑", ".3f"),
    "lpips": ("", "LPIPS ↓", ".4f"),
    "clip_score": ("CLIP", "score ↑", ".2f"),
}

# With features of InceptionV3 they have names of their own.
_OF_INCEPTION = {
    "frechet_distance": ("", "FID ↓", ".3f"),
    "kernel_distance": ("", "KID ↓", ".5f"),
    "spatial_frechet_distance": ("", "sFID ↓", ".3f"),
}

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --quiet: #63636a; --page: #ffffff;
  --line: #dcdce0; --mark: #fdf0e6; --accent: #b34a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececef; --quiet: #a5a5ad;
  --page: #17171a; --line: #3a3a40; --mark: #3a2a1c; --accent: #ff9a4d; } }
@media print { :root { --ink: #000; --quiet: #444; --page: #fff; --line: #bbb;
  --mark: #f4f4f4; --accent: #000; }
  figure, table, section { break-inside: avoid; } body { margin: 0; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.headline { font-size: 1.15rem; border-left: 4px solid var(--accent);
  padding-left: .9rem; margin: 1rem 0; }
.quiet, figcaption, caption { color: var(--quiet); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  margin: .4rem 0; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem;
  text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: .3rem; }
td:first-child { white-space: nowrap; }
thead th { border-bottom-width: 2px; vertical-align: bottom; }
tr.student { background: var(--mark); font-weight: 600; }
table.pairs td { text-align: left; overflow-wrap: anywhere; }
table.pairs td:first-child { color: var(--quiet); }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: 6px; padding: .4rem;
  box-sizing: border-box; }
.plots img { max-width: min(100%, 46rem); }
summary { cursor: pointer; font-weight: 600; margin: 1rem 0 .4rem; }
"""


def _number(value: float | None, form: str) -> str:
    return EN_DASH if value is None else format(value, form)


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return EN_DASH
    form = ",.0f" if seconds >= 0.1 else "#.3g"
    return format(1e3 * seconds, form).rstrip(".")


def _columns(results: Mapping[str, Any]) -> dict[str, tuple[str, str, str]]:
    """The figures to show: header in two lines, and format."""
    own = results.get("student") or {}
    shown = _FIGURES | {k: v for k, v in MORE_FIGURES.items() if k in own}
    if results.get("distance_name") == "FID":
        shown |= {k: v for k, v in _OF_INCEPTION.items() if k in shown}
    return shown


def _header(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    figures = [(above, below) for above, below, _ in _columns(results).values()]
    return [("", "sampler"), ("network", "calls"), *figures, ("ms per", "image ↓")]


def _row(
    label: str,
    calls: object,
    figures: Mapping[str, Any],
    columns: Mapping[str, tuple[str, str, str]],
    with_intervals: bool = False,
) -> list[str]:
    intervals = (figures.get("intervals") or {}) if with_intervals else {}

    def cell(name: str, form: str) -> str:
        value = _number(figures.get(name), form)
        if name not in intervals:
            return value
        low, high = intervals[name]
        return f"{value} ({low:{form}} to {high:{form}})"

    return [
        label,
        EN_DASH if calls is None else str(calls),
        *(cell(name, form) for name, (_, _, form) in columns.items()),
        _milliseconds(figures.get("seconds_per_image")),
    ]


def _ddim(results: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    entries = (results.get("teacher") or {}).get("ddim") or {}
    return {int(steps): entries[steps] for steps in sorted(entries, key=int)}


def _rows(results: Mapping[str, Any], with_intervals: bool = False) -> list[list[str]]:
    """The student first, the teacher's DDIM by steps, its ODE, and real images."""
    found: list[tuple[str, object, Mapping[str, Any]]] = [
        ("student, 1 step", 1, results.get("student") or {})
    ]
    for steps, figures in _ddim(results).items():
        plural = "step" if steps == 1 else "steps"
        found.append((f"teacher, {steps} DDIM {plural}", steps, figures))
    if ode := (results.get("teacher") or {}).get("ode"):
        name = ode.get("name") or "ODE"
        found.append((f"teacher, {name}", ode.get("network_calls"), ode))
    if real := results.get("selftest"):
        found.append((f"{real['num_images']} real images", None, real))
    columns = _columns(results)
    return [_row(*row, columns, with_intervals) for row in found]


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
        f"{f'{above} {below}'.strip(' ↓↑')} {low:{form}} to {high:{form}}"
        for name, (above, below, form) in _columns(results).items()
        if name in intervals
        for low, high in [intervals[name]]
    ]
    return [f"95 % intervals of the student: {', '.join(shown)}"] if shown else []


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
    rows = [*map(list, zip(*_header(results), strict=True)), *_rows(results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(2, ["-" * width for width in widths])
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    below = [*_interval_lines(results), *_notes(results)]
    return "\n".join([headline(results), "", *lines, *([""] if below else []), *below])


def _table(
    header: Sequence[object], rows: Iterable[Sequence[object]], caption: str = ""
) -> str:
    head = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in header)
    body = []
    for row in rows:
        kind = ' class="student"' if str(row[0]).startswith("student") else ""
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in row)
        body.append(f"<tr{kind}>{cells}</tr>")
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _pairs(pairs: Mapping[str, object]) -> str:
    rows = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>"
        for name, value in pairs.items()
    )
    return f'<div class="scroll"><table class="pairs">{rows}</table></div>'


def _flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _figure(caption: str, png: bytes) -> str:
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"the image {caption!r} must be the bytes of a PNG file")
    data = base64.b64encode(png).decode("ascii")
    text = escape(caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _facts(results: Mapping[str, Any]) -> dict[str, object]:
    ratio = (results.get("student") or {}).get("variance_ratio")
    facts: dict[str, object] = {
        "features": results.get("features"),
        "images scored": results.get("num_images"),
        "reference data": results.get("data"),
        "student's variance / reference's": _number(ratio, ".3f"),
        "device": results.get("device"),
    }
    for name, judge in (results.get("judges") or {}).items():
        facts[name.replace("_", " ")] = judge
    for name, value in (results.get("reference") or {}).items():
        facts[f"reference, {name.replace('_', ' ')}"] = value
    for phase, seconds in (results.get("seconds") or {}).items():
        facts[f"time, {phase}"] = f"{_number(seconds, '.1f')} s"
    for package, version in (results.get("versions") or {}).items():
        facts[f"version, {package}"] = version
    return {name: EN_DASH if v is None else v for name, v in facts.items()}


def _page(title: str, body: Sequence[str]) -> str:
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>{escape(title)}</h1>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    results: Mapping[str, Any],
    images: Mapping[str, bytes],
    config: Mapping[str, Any],
    tables: Mapping[str, Sequence[Mapping[str, object]]] | None = None,
) -> None:
    """Writes the report: one HTML file that needs no other, whole or not at all.

    Args:
      path: the file; its folder must exist, and an older report there is replaced.
      title: plain text, as are all captions and values.
      results: see the module's text.
      images: caption -> PNG bytes; the first, the sample grid, stands at the top.
      config: the run's, nested; shown with dotted names.
      tables: caption -> rows, each a mapping with the columns of the first.

    Raises:
      ValueError: an image that is not a PNG.
    """
    figures = [_figure(caption, png) for caption, png in images.items()]
    about = f"Distances in {results.get('features') or 'unnamed'} features"
    body = [f'<p class="headline">{escape(headline(results))}</p>']
    body += ["<h2>Samples</h2>", *figures[:1]] if figures else []
    header = [" ".join(lines).strip() for lines in _header(results)]
    cells = _rows(results, with_intervals=True)
    body += ["<h2>Student and teacher</h2>", _table(header, cells, about)]
    body += [f'<p class="quiet">{escape(text)}</p>' for text in _notes(results)]
    for caption, rows in (tables or {}).items():
        columns = list(rows[0]) if rows else []
        cells = [[row.get(column, EN_DASH) for column in columns] for row in rows]
        body.append(_table(columns, cells, caption))
    if figures[1:]:
        body += ['<div class="plots">', "<h2>Plots</h2>", *figures[1:], "</div>"]
    body += ["<h2>How it was measured</h2>", _pairs(_facts(results))]
    body.append("<details><summary>Configuration</summary>")
    body += [_pairs(_flattened(config)), "</details>"]
    _write_atomically(Path(path), _page(title, body))


def _write_atomically(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
