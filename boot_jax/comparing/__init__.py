"""The comparison bench: many methods on one teacher, under one budget.

`compare` trains every method that ``config.compare`` names from every seed within every
budget, scores all against the same teacher, and writes ``comparison.json``, a table in
Markdown, a plot, a grid and a page. What is there already is not done again, and
processes may share the work; docs/comparing.md has more.
"""

import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from boot_jax import distributed, summary
from boot_jax.comparing.cells import Cell
from boot_jax.comparing.claims import claimed
from boot_jax.comparing.methods import check_section, methods_of
from boot_jax.comparing.scoring import Scorer
from boot_jax.evaluation import comparison as comparison_lib
from boot_jax.evaluation import plots
from boot_jax.evaluation.comparison_page import write_comparison
from boot_jax.evaluation.teacher_side import TeacherSide
from boot_jax.run import Run
from boot_jax.workdir import write_text

# Of the teacher's numbers of steps, the lines of a plot.
_MOST_LINES = 3


def compare(run: Run) -> pathlib.Path:
    """Does what is missing of a comparison, and writes what it came to.

    Args:
      run: of the config, in the workdir of the comparison.

    Returns:
      The path of the page.

    Raises:
      ConfigError: ``config.compare`` makes no sense.
      WorkdirError: a cell's folder is of another config.
      Preempted: it was asked to stop, and has saved.
    """
    config = run.config
    check_section(config)
    methods = methods_of(config)
    cells = [
        Cell(run, method, amount, seed)
        for seed in config.compare.seeds
        for amount in config.compare.amounts
        for method in methods
    ]
    for cell in cells:
        cell.check()
    with claimed(run.workdir / "teacher.lock", wait=True):
        _ = run.teacher
    scorer = Scorer(run, _say)
    side, _ = scorer.teacher_side(run)
    left = _run_all(cells, scorer)
    done = [cell for cell in cells if cell not in left]
    comparison = _comparison(run, scorer, side, done, left)
    return _write(run, comparison, scorer, side, done)


def _say(text: str) -> None:
    if distributed.is_main():
        print(f"compare: {text}", file=sys.stderr, flush=True)


def _run_all(cells: list[Cell], scorer: Scorer) -> list[Cell]:
    """Runs what no other process is at; gives the cells that are left to others."""
    left = cells
    while True:
        still = [cell for cell in left if not cell.run(scorer)]
        if len(still) in (0, len(left)):
            return still
        left = still  # others may have ended since, or died


def _comparison(
    run: Run, scorer: Scorer, side: TeacherSide, done: list[Cell], left: list[Cell]
) -> dict[str, Any]:
    section, scoring = run.config.compare, scorer.judge.scoring
    results = [result for cell in done if (result := cell.result()) is not None]
    warnings = [text for result in results for text in result.pop("warnings")]
    if left:
        warnings.append(
            f"{len(left)} of {len(done) + len(left)} cells are being run by other "
            "processes; once they have ended, the same command collects all"
        )
    for result in results:
        result.pop("scored")
    reference = scoring.reference or side.own
    return {
        "budget": {"by": section.budget, "amounts": list(section.amounts)},
        "features": scoring.features.name,
        "distance_name": scoring.features.distance_name,
        "num_images": scoring.options["num_images"],
        "reference": reference.provenance,
        "teacher": {"ddim": side.ddim, "ode": side.ode},
        "cells": results,
        "methods": comparison_lib.by_method(results),
        "warnings": list(dict.fromkeys(warnings)),
        "versions": summary.versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        **scorer.judge.told,
    }


def _write(
    run: Run,
    comparison: dict[str, Any],
    scorer: Scorer,
    side: TeacherSide,
    done: list[Cell],
) -> pathlib.Path:
    path = run.workdir / "comparison.html"
    shown = scorer.show(_rows(run, side, done))

    def write() -> None:
        table = comparison_lib.markdown(comparison)
        text = json.dumps(comparison, indent=2, allow_nan=False)
        write_text(run.workdir / "comparison.json", text + "\n")
        write_text(run.workdir / "comparison.md", table)
        figures: dict[str, bytes] = {}
        if any(method["figures"] for method in comparison["methods"]):
            plot = figures["quality against budget"] = _plot(comparison)
            (run.workdir / "comparison.png").write_bytes(plot)
        images = {
            name: np.stack([sample.image for sample in samples])
            for name, samples in shown.rows.items()
        }
        if images:
            summary.save_grid(run.workdir / "samples" / "comparison.png", images)
        write_comparison(
            path,
            title=run.config.title,
            comparison=comparison,
            images=figures,
            rows=shown.rows,
            config=run.config.to_dict(),
            note=shown.note,
        )
        print(f"\n{table}\n")

    distributed.on_main(write)
    return path


def _rows(run: Run, side: TeacherSide, done: list[Cell]) -> dict[str, np.ndarray]:
    """The same noises by the teacher and by each method, with the largest budget."""
    section, rows = run.config.compare, dict(side.rows)
    for cell in done:
        if cell.amount == max(section.amounts) and cell.seed == section.seeds[0]:
            samples = cell.shown()
            if samples is not None:
                rows[cell.method.name] = samples
    return rows


def _plot(comparison: dict[str, Any]) -> bytes:
    by, name = comparison["budget"]["by"], "frechet_distance"
    found: dict[str, plots.Curve] = {}
    for method in comparison["methods"]:
        if figure := method["figures"].get(name):
            spent = {
                "calls": sum(n for k, n in method["calls"].items() if k != "images"),
                "seconds": method["seconds"],
                "steps": method["steps"],
            }[by]
            curve = found.setdefault(method["method"], plots.Curve([], [], []))
            curve.budgets.append(spent)
            curve.distances.append(figure["mean"])
            curve.intervals.append(figure["interval"])
    ddim = comparison["teacher"]["ddim"]
    steps = sorted(map(int, ddim))[-_MOST_LINES:]
    lines = {
        f"teacher, {n} DDIM step{'' if n == 1 else 's'}": ddim[str(n)][name]
        for n in steps
    }
    ode = comparison["teacher"]["ode"]
    return plots.quality_against_budget(
        found,
        lines | {f"teacher, {ode['name']}": ode[name]},
        comparison_lib.UNITS[by].spent,
        comparison["features"],
        f"{comparison['distance_name']} (lower is better)",
    )
