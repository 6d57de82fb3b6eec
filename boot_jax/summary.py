"""What a finished run shows: ``results.json``, the report, and the table it prints."""

import importlib.metadata
import json
import math
import pathlib
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from boot_jax.evaluation import paired, plots, report
from boot_jax.evaluation.nearest import ShownSample
from boot_jax.sampling import generate
from boot_jax.training.logs import read_metrics
from boot_jax.workdir import write_text

_PACKAGES = ("boot_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a figure depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "from a checkout"
    return found


class Stopwatch:
    """Says on the terminal what is being done, and how long all of it took."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def progress(self, text: str) -> None:
        """Names what begins now."""
        if jax.process_index() == 0:
            print(f"evaluate: {text}", file=sys.stderr)

    def seconds(self) -> float:
        """Since the watch was made."""
        return time.perf_counter() - self._start


def save_images(folder: pathlib.Path, images: np.ndarray) -> None:
    """Writes ``grid.png`` and ``00000.png``, ``00001.png``, ... into a folder.

    What is no image, having neither one nor three channels, goes to ``samples.npy``.

    Args:
      folder: made if it is not there.
      images: ``[N, H, W, C]``, images in [-1, 1].
    """
    folder.mkdir(parents=True, exist_ok=True)
    if images.shape[-1] not in (1, 3):
        np.save(folder / "samples.npy", images)
        return
    for path in folder.glob("[0-9][0-9][0-9][0-9][0-9].png"):
        path.unlink()  # of an earlier call, which may have asked for more
    columns = math.ceil(math.sqrt(len(images)))
    # The last row is filled up with white.
    missing = np.ones((-len(images) % columns, *images.shape[1:]), images.dtype)
    cells = np.concatenate([images, missing])
    rows = {
        str(start): cells[start : start + columns]
        for start in range(0, len(cells), columns)
    }
    (folder / "grid.png").write_bytes(plots.encode_png(plots.image_grid(rows)))
    for index, image in enumerate(plots.to_uint8(images)):
        single = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        single.save(folder / f"{index:05d}.png")


def save_grid(path: pathlib.Path, rows: Mapping[str, np.ndarray]) -> None:
    """Writes rows of images, each with its name, as one picture.

    Args:
      path: of the PNG; its folder is made if it is not there.
      rows: name to ``[N, H, W, C]``; what is no image is not shown.
    """
    if all(images.shape[-1] in (1, 3) for images in rows.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plots.encode_png(plots.image_grid(rows)))


def save_animation(path: pathlib.Path, images: np.ndarray, seconds: float = 4) -> None:
    """Writes images ``[N, H, W, C]`` one after the other, as a GIF that repeats."""
    if images.shape[-1] not in (1, 3):
        return
    frames = [plots.image_grid({"": image[None]}) for image in images]
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=max(20, round(1000 * seconds / len(frames))),
        loop=0,
    )


def training_seconds(directory: pathlib.Path) -> float:
    """What a training took in all its stages and sessions, with its stored samples."""
    folders = [directory, *(directory / "stages").glob("*")]
    rows = [row for folder in folders for row in read_metrics(folder)]
    stored = directory / "stored_samples" / "meta.json"
    if stored.exists():
        rows.append(json.loads(stored.read_text()))
    return sum(row.get("seconds", 0.0) for row in rows)


def write(
    workdir: pathlib.Path,
    config: Any,
    results: dict[str, Any],
    rows: Mapping[str, Sequence[ShownSample]],
    note: str,
    pair: paired.Pair,
    mesh: Mesh,
    evaluation_seconds: float,
) -> pathlib.Path:
    """Writes ``results.json``, the grid and ``report.html``; prints a table.

    Args:
      workdir: where to.
      config: of the run.
      results: of `paired.compare`.
      rows, note: of `boot_jax.judging.Shown`.
      pair: who was compared; a two-dimensional one gets a plot of its map.
      mesh: of devices.
      evaluation_seconds: what the comparison took.

    Returns:
      The report's path.
    """
    results["seconds"] = {
        "teacher": training_seconds(workdir / "teacher"),
        "distill": training_seconds(workdir),
        "evaluate": evaluation_seconds,
    }
    results["versions"] = versions()
    results["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    ends = _ends(pair, mesh) if pair.teacher.sample_shape == (1, 1, 2) else None
    path = workdir / "report.html"
    if jax.process_index() == 0:
        images = _figures(workdir, results, rows, pair, ends)
        text = json.dumps(results, indent=2, allow_nan=False)
        write_text(workdir / "results.json", text + "\n")
        report.write_report(
            path,
            title=config.title,
            results=results,
            images=images,
            config=config.to_dict(),
            rows=rows,
            note=note,
        )
        print(f"\n{report.summary_table(results)}\n")
    return path


def _figures(
    workdir: pathlib.Path,
    results: Mapping[str, Any],
    rows: Mapping[str, Sequence[ShownSample]],
    pair: paired.Pair,
    ends: list[np.ndarray] | None,
) -> dict[str, bytes]:
    figures: dict[str, bytes] = {}
    if ends is not None:
        title = "where each noise goes: exact ODE and student"
        figures[title] = plots.map_scatter(*ends)
    if rows:
        shown = {
            name: np.stack([sample.image for sample in samples])
            for name, samples in rows.items()
        }
        save_grid(workdir / "samples" / "grid.png", shown)
    ddim = results["teacher"]["ddim"]
    figures["quality against teacher steps"] = plots.quality_against_steps(
        [int(steps) for steps in ddim],
        [scores["frechet_distance"] for scores in ddim.values()],
        {1: results["student"]["frechet_distance"]}
        | {
            int(steps): scores["frechet_distance"]
            for steps, scores in (results.get("student_steps") or {}).items()
        },
        results["features"],
        f"{results['distance_name']} (lower is better)",
    )
    if curve := results.get("error_over_time"):
        figures["error of the student over target time"] = plots.error_over_time(
            curve["times"], {"student": curve["student"]}
        )
    for name, folder in (("student", workdir), ("teacher", workdir / "teacher")):
        if metrics := read_metrics(folder):
            rows_with_loss = [row for row in metrics if "loss" in row]
            steps = [int(row["step"]) for row in rows_with_loss]
            losses = [row["loss"] for row in rows_with_loss]
            title = f"loss of the {name}"
            figures[title] = plots.loss_curve(steps, losses, title)
    return figures


def _ends(
    pair: paired.Pair, mesh: Mesh, num: int = 600, seed: int = 5
) -> list[np.ndarray]:
    """Noises ``[num, 2]``, and where the exact ODE and the student take them."""
    noise = pair.noise(seed)
    samplers = (lambda eps, _: eps, pair.ode(128), pair.student())
    made = (generate(s, noise, pair.condition, num, num, mesh) for s in samplers)
    return [generated.images.reshape(num, 2) for generated in made]
