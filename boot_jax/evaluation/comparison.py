"""What the cells of a comparison come to: means over seeds, and a table.

A *cell* is one method within one budget from one seed; `boot_jax.comparing` makes them.
Of several seeds a figure has its mean and the 95 % interval of Student's t,

    mean +- t(0.975, n - 1) s / sqrt(n),     s^2 = sum (x - mean)^2 / (n - 1),   (1)

which tells how training differs from seed to seed, all scored on the same noises. Of a
single seed it has the bootstrap interval of its images, and says so.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from boot_jax.evaluation.figures import columns_of
from boot_jax.evaluation.pages import EN_DASH

#: What an interval is over.
OVER_SEEDS, OVER_IMAGES = "seeds", "images"


class Unit(NamedTuple):
    """What a budget is counted in.

    Attributes:
      amount: what an amount is, in a sentence.
      column: the same in a column's name.
      spent: what is spent of it, along an axis.
    """

    amount: str
    column: str
    spent: str


#: Of the values of ``compare.budget``.
UNITS = {
    "calls": Unit(
        "times the config's network calls",
        "times its calls",
        "network calls of the training",
    ),
    "seconds": Unit("seconds of training", "seconds", "seconds of training"),
    "steps": Unit("times the config's steps", "times its steps", "training steps"),
}

# More columns of the table, and their decimals.
_MORE = {"ddim_equivalent_steps": ("worth in DDIM steps ↑", ".1f")}

_NOTES = {
    OVER_SEEDS: "Intervals of {} seeds: 95 %, Student's t over the seeds.",
    OVER_IMAGES: "Intervals of one seed, and of the teacher: 95 %, bootstrap over the "
    "images.",
}


def seed_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The interval of a mean over seeds, eq. (1).

    Args:
      values: one a seed, at least two.
      level: of confidence.

    Raises:
      ValueError: there is one value only.

    >>> low, high = seed_interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    given = np.asarray(values, np.float64)
    if len(given) < 2:
        raise ValueError("an interval over seeds needs two of them at least")
    quantile = stats.t.ppf((1.0 + level) / 2.0, len(given) - 1)
    half = quantile * given.std(ddof=1) / np.sqrt(len(given))
    return float(given.mean() - half), float(given.mean() + half)


def by_method(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The methods within each budget, in the order of their first cells.

    Args:
      cells: of `boot_jax.comparing`.

    Returns:
      ``{"method", "amount", "num_seeds", "figures": {name: {"mean", "interval",
      "interval_over", "per_seed"}}, "calls", "steps", "seconds", "memory",
      "needs_data", "failed"}`` of each; ``num_seeds`` are those that did not fail.
    """
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["method"], cell["amount"]), []).append(cell)
    return [_method(*key, group) for key, group in groups.items()]


def _method(
    name: str, amount: float, group: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    good = [cell for cell in group if cell["failed"] is None]
    costs = good or group
    names = [
        figure
        for figure in (good[0]["scores"] if good else ())
        if figure != "intervals" and all(figure in cell["scores"] for cell in good)
    ]
    first = costs[0]
    return {
        "method": name,
        "amount": amount,
        "num_seeds": len(good),
        "figures": {figure: _figure(figure, good) for figure in names},
        "calls": first["calls"],
        "steps": first["steps"],
        "seconds": float(np.mean([cell["seconds"] for cell in costs])),
        "memory": first["memory"],
        "needs_data": first["needs_data"],
        "failed": len(group) - len(good),
    }


def _figure(name: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = [float(cell["scores"][name]) for cell in cells]
    if len(values) > 1:
        interval, over = list(seed_interval(values)), OVER_SEEDS
    else:
        interval = (cells[0]["scores"].get("intervals") or {}).get(name)
        over = None if interval is None else OVER_IMAGES
    return {
        "mean": float(np.mean(values)),
        "interval": interval,
        "interval_over": over,
        "per_seed": values,
    }


def markdown(comparison: Mapping[str, Any]) -> str:
    """The table in Markdown, with what is to be said below it.

    Args:
      comparison: of `boot_jax.comparing`: ``methods``, ``cells``, ``teacher``,
        ``budget``, ``features``, ``num_images``, ``data``, ``device``, ``warnings``.
    """
    methods, by = comparison["methods"], comparison["budget"]["by"]
    there = {name for method in methods for name in method["figures"]}
    known = columns_of(comparison["distance_name"], there)
    shown = {name: (column.title, column.form) for name, column in known.items()}
    columns = {k: head for k, head in (shown | _MORE).items() if k in there}
    several = len(comparison["budget"]["amounts"]) > 1
    head = ["method", *([f"budget ({by})"] if several else [])]
    head += [head for head, _ in columns.values()]
    kinds = ["teacher", "student"]
    if any(method["calls"].get("auxiliary") for method in methods):
        kinds.append("auxiliary")
    head += ["steps", *(f"{name} calls" for name in kinds), "real images", "seconds"]
    head += ["memory", "needs data"]
    rows = []
    for method in methods:
        figures, calls = method["figures"], method["calls"]
        rows.append(
            [
                _label(method),
                *([f"{method['amount']:g}"] if several else []),
                *(
                    _cell(figures.get(name) or {}, form)
                    for name, (_, form) in columns.items()
                ),
                f"{method['steps']:,}",
                *(_count(calls[name]) for name in (*kinds, "images")),
                f"{method['seconds']:.3g}",
                _bytes(method["memory"]["bytes"]),
                "yes" if method["needs_data"] else "no",
            ]
        )
    for label, scores in _teacher_rows(comparison["teacher"]):
        shown = [
            _cell(_of_teacher(scores, name), form)
            for name, (_, form) in columns.items()
        ]
        rest = len(head) - 1 - several - len(shown)
        rows.append([label, *([EN_DASH] * several), *shown, *([EN_DASH] * rest)])
    lines = [_line(head), _line(["---"] * len(head)), *map(_line, rows), ""]
    return "\n".join([*lines, *(f"{note}\n" for note in _notes(comparison))])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _label(method: Mapping[str, Any]) -> str:
    lost, name = method["failed"], method["method"]
    return f"{name} ({lost} of {lost + method['num_seeds']} failed)" if lost else name


def _cell(figure: Mapping[str, Any], form: str) -> str:
    if figure.get("mean") is None:
        return EN_DASH
    value = format(figure["mean"], form)
    if not figure.get("interval"):
        return value
    low, high = figure["interval"]
    return f"{value} ({low:{form}} to {high:{form}})"


def _of_teacher(scores: Mapping[str, Any], name: str) -> dict[str, Any]:
    intervals = scores.get("intervals") or {}
    return {"mean": scores.get(name), "interval": intervals.get(name)}


def _teacher_rows(
    teacher: Mapping[str, Any],
) -> list[tuple[str, Mapping[str, Any]]]:
    """The DDIM by steps, then the ODE."""
    found = [
        (f"teacher, {steps} DDIM step{'' if int(steps) == 1 else 's'}", scores)
        for steps, scores in sorted(teacher["ddim"].items(), key=lambda i: int(i[0]))
    ]
    return [*found, (f"teacher, {teacher['ode']['name']}", teacher["ode"])]


def _count(value: float) -> str:
    """For instance ``1.28 M``.

    >>> _count(1_280_000), _count(999), _count(0)
    ('1.28 M', '999', '0')
    """
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _bytes(value: float | None) -> str:
    return EN_DASH if value is None else f"{value / 1e6:.3g} MB"


def _notes(comparison: Mapping[str, Any]) -> list[str]:
    budget = comparison["budget"]
    within = UNITS[budget["by"]].amount
    amounts = ", ".join(f"{amount:g}" for amount in budget["amounts"])
    notes = [
        f"Budget: {amounts} {within}. {comparison['num_images']:,} images, "
        f"{comparison['features']} features, against {comparison['data']}. Calls are "
        "evaluations of either network for one image, all of the training's; memory is "
        f"that of the compiled training step. {comparison['device']}."
    ]
    methods = comparison["methods"]
    counts = sorted({method["num_seeds"] for method in methods} - {0, 1})
    if counts:
        notes.append(_NOTES[OVER_SEEDS].format(" or ".join(map(str, counts))))
    notes.append(_NOTES[OVER_IMAGES])
    for cell in comparison["cells"]:
        if cell["failed"] is not None:
            where = f"{cell['method']}, {cell['amount']:g}, seed {cell['seed']}"
            notes.append(f"Failed: {where}: {cell['failed']}")
    return notes + [f"Warning: {text}" for text in comparison["warnings"]]
