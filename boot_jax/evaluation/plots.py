"""Pictures of a run: sample grids and curves, as PNG bytes.

Matplotlib is used through `matplotlib.figure.Figure` alone: no display, no pyplot and
no global state, so a plot may be drawn from any thread. Colours are those of Okabe and
Ito, which colour-blind readers can tell apart.
"""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from boot_jax.evaluation.metrics import equivalent_steps

TEACHER_COLOUR = "#444444"
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")

# Where there are more lines than colours; and of the teacher's.
_MARKERS, _DASHES = ("o", "s", "^"), ("--", ":", "-.", (0, (1, 4)))

# Height of an image in a grid, in pixels, at which a person can read a digit.
LEGIBLE_SIZE = 64


def to_uint8(images: ArrayLike) -> NDArray[np.uint8]:
    """Maps floats in [-1, 1] to 0 ... 255: rounded to nearest, clipped where beyond.

    Raises:
      ValueError: NaN or infinity among them, which have no colour.
    """
    values = np.asarray(images).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("images must be finite to be shown: found NaN or infinity")
    return np.rint(np.clip(values * 127.5 + 127.5, 0.0, 255.0)).astype(np.uint8)


def encode_png(image: Image.Image) -> bytes:
    """The image as a PNG file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def image_grid(rows: Mapping[str, ArrayLike], scale: int | None = None) -> Image.Image:
    """Rows of images, each with its label at the left.

    Give every row the same noises in the same order: a column then shows one noise.

    Args:
      rows: label -> ``[N, H, W, C]`` floats in [-1, 1], C being 1 (grey) or 3 (RGB).
      scale: whole factor of enlargement (nearest neighbour); None: the least that makes
        images 64 pixels high or more.

    Raises:
      ValueError: no rows, rows of different shapes, other channels, or NaN.
    """
    pixels = {label: to_uint8(images) for label, images in rows.items()}
    shapes = {images.shape for images in pixels.values()}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
        raise ValueError(
            "a grid needs rows [N, H, W, C] of one shape, with C 1 or 3, but was "
            f"given {sorted(map(list, shapes))}; decode latents to images first"
        )
    count, height, width, _ = shape
    scale = scale or max(1, -(-LEGIBLE_SIZE // height))
    height, width, gap = height * scale, width * scale, 4
    font = ImageFont.load_default(size=16)
    margin = round(max(font.getlength(label) for label in pixels)) + 4 * gap
    size = (margin + count * (width + gap), gap + len(pixels) * (height + gap))
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for row, (label, images) in enumerate(pixels.items()):
        top = gap + row * (height + gap)
        place = (margin - 2 * gap, top + height // 2)
        draw.text(place, label, fill="black", font=font, anchor="rm")
        for column, image in enumerate(images):
            enlarged = image.repeat(scale, axis=0).repeat(scale, axis=1)
            tile = Image.fromarray(np.broadcast_to(enlarged, (height, width, 3)).copy())
            grid.paste(tile, (margin + column * (width + gap), top))
    return grid


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.0, 4.4), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    _dress(axes, title, xlabel, ylabel)
    return figure, axes


def _dress(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _render(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _plain_log_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers, and enough of them on a short one."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    labelled: tuple[int, ...] = (1,)
    for most, digits in ((300, (1, 2, 5)), (12, (1, 2, 3, 5, 7)), (4, range(1, 10))):
        if high / low < most:
            labelled = tuple(digits)

    def plain(value: float, _: object) -> str:
        digit = round(value / 10.0 ** np.floor(np.log10(value) + 1e-9))
        return f"{value:g}" if digit in labelled else ""

    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    axes.yaxis.set_minor_formatter(FuncFormatter(plain))


def quality_against_steps(
    steps: Sequence[int],
    teacher_distances: Sequence[float],
    students: Mapping[int, float],
    feature_name: str,
    ylabel: str = "Fréchet distance (lower is better)",
) -> bytes:
    """The teacher's distance at each number of steps, and the student's at each of its.

    The student is a star. The dashed line through it meets the teacher's curve at the
    number of steps that it is worth (see `metrics.equivalent_steps`).

    Args:
      steps: the teacher's numbers of steps.
      teacher_distances: its distance at each of them.
      students: the student's number of steps -> distance.
      feature_name: the features that the distances were taken in.
      ylabel: what the distance is.
    """
    title = f"Quality against network calls — {feature_name}"
    figure, axes = _axes(title, "sampling steps (network calls)", ylabel)
    axes.set_xscale("log")
    order = np.argsort(steps)
    axes.plot(
        np.asarray(steps)[order],
        np.asarray(teacher_distances)[order],
        color=TEACHER_COLOUR,
        marker="o",
        label="teacher, DDIM",
    )
    for i, (own, distance) in enumerate(students.items()):
        colour = COLOURS[i % len(COLOURS)]
        equal = equivalent_steps(steps, teacher_distances, distance)
        name = f"student, {own} step{'' if own == 1 else 's'}"
        label = f"{name}: {distance:.3g} ({equal} DDIM steps)"
        axes.plot([1, max(steps)], [distance] * 2, "--", color=colour, linewidth=1.2)
        star = {"marker": "*", "markersize": 16, "linestyle": "none", "zorder": 4}
        axes.plot([own], [distance], color=colour, mec="white", label=label, **star)
        if equal.censored == "none":
            axes.plot(
                [equal.value], [distance], "D", color=colour, mec="white", zorder=4
            )
            axes.annotate(
                f"{equal} steps",
                (equal.value, distance),
                xytext=(7, 7),
                textcoords="offset points",
                color=colour,
                fontweight="bold",
            )
    _plain_log_axis(axes)
    axes.set_xticks(sorted(steps), [str(step) for step in sorted(steps)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, loc="best")
    return _render(figure)


def error_over_time(
    times: Sequence[float], curves: Mapping[str, Sequence[float]]
) -> bytes:
    """Normalised error against the target time ``t`` in [0, 1], from noise to data.

    Args:
      times: the target times.
      curves: label -> normalised error at each time; zeros are left out.
    """
    figure, axes = _axes(
        "Error along the trajectory",
        "target time t  (1 = noise, 0 = data)",
        "squared error over the images' variance",
    )
    order = np.argsort(times)
    for i, (label, values) in enumerate(curves.items()):
        errors = np.asarray(values, np.float64)[order]
        axes.plot(
            np.asarray(times)[order],
            np.where(errors > 0.0, errors, np.nan),
            color=COLOURS[i % len(COLOURS)],
            marker="osD^v"[i % 5],
            markersize=4,
            label=label,
        )
    _plain_log_axis(axes)
    axes.set_xlim(1.03, -0.03)
    axes.legend(frameon=False)
    return _render(figure)


def loss_curve(
    steps: Sequence[int], losses: Sequence[float], title: str = "Loss"
) -> bytes:
    """The loss at each step, faint, and its moving average over 2 % of the points.

    Losses that have no logarithm (0, NaN, infinity) are left out, and counted in the
    title, so that a run that diverged shows it.
    """
    x, y = np.asarray(steps), np.asarray(losses, np.float64)
    shown = np.isfinite(y) & (y > 0.0)
    if left_out := int((~shown).sum()):
        title = f"{title} (left out, 0 or not finite: {left_out} of {len(y)})"
    x, y = x[shown], y[shown]
    figure, axes = _axes(title, "step", "loss")
    if len(y):
        window = np.ones(min(max(len(y) // 50, 1), len(y)))
        counts = np.convolve(np.ones(len(y)), window, mode="same")
        smooth = np.convolve(y, window, mode="same") / counts
        axes.plot(x, y, color=COLOURS[1], alpha=0.25, linewidth=0.8, label="each")
        axes.plot(x, smooth, color=COLOURS[1], linewidth=1.8, label="moving average")
        _plain_log_axis(axes)
        axes.legend(frameon=False)
    return _render(figure)


class Curve(NamedTuple):
    """Of a method.

    Attributes:
      budgets: rising.
      distances: at each of them.
      intervals: the ends of each distance's interval; None for none.
    """

    budgets: list[float]
    distances: list[float]
    intervals: list[Sequence[float] | None]


def quality_against_budget(
    methods: Mapping[str, Curve],
    teacher: Mapping[str, float],
    budget: str,
    feature_name: str,
    ylabel: str = "Fréchet distance (lower is better)",
) -> bytes:
    """Each method's distance at each budget; the teacher's samplers as lines.

    Methods that all had a single budget stand one below the other, by name.

    Args:
      methods: label -> its curve.
      teacher: label -> the distance of a sampler of many steps.
      budget: what the budget is.
      feature_name: the features that the distances were taken in.
      ylabel: what the distance is.
    """
    if all(len(curve.budgets) == 1 for curve in methods.values()):
        return _quality_of_methods(methods, teacher, feature_name, ylabel)
    figure, axes = _axes(f"Quality against budget — {feature_name}", budget, ylabel)
    axes.set_xscale("log")
    for i, (label, curve) in enumerate(methods.items()):
        axes.errorbar(
            curve.budgets,
            curve.distances,
            yerr=_reach(curve),
            color=COLOURS[i % len(COLOURS)],
            marker=_MARKERS[i // len(COLOURS) % len(_MARKERS)],
            capsize=3,
            label=label,
        )
    for i, (label, distance) in enumerate(teacher.items()):
        style = _DASHES[i % len(_DASHES)]
        axes.axhline(distance, color=TEACHER_COLOUR, linestyle=style, label=label)
    _plain_log_axis(axes)
    # Budgets that differ by rounding alone share a tick.
    budgets = [budget for curve in methods.values() for budget in curve.budgets]
    axes.set_xticks(
        list({float(f"{budget:.2g}"): budget for budget in budgets}.values())
    )
    axes.xaxis.set_major_formatter(EngFormatter(places=2))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return _render(figure)


def _quality_of_methods(
    methods: Mapping[str, Curve],
    teacher: Mapping[str, float],
    feature_name: str,
    xlabel: str,
) -> bytes:
    figure = Figure(
        figsize=(8.6, 1.6 + 0.3 * len(methods)), dpi=144, layout="constrained"
    )
    axes = figure.add_subplot()
    _dress(axes, f"Quality at one budget — {feature_name}", xlabel, "")
    for place, curve in enumerate(methods.values()):
        axes.errorbar(
            curve.distances,
            [place],
            xerr=_reach(curve),
            color=COLOURS[place % len(COLOURS)],
            fmt="o",
            capsize=3,
        )
    for i, (label, distance) in enumerate(teacher.items()):
        style = _DASHES[i % len(_DASHES)]
        axes.axvline(distance, color=TEACHER_COLOUR, linestyle=style, label=label)
    axes.set_yticks(range(len(methods)), list(methods))
    axes.invert_yaxis()
    if teacher:
        axes.legend(
            frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
        )
    return _render(figure)


def _reach(curve: Curve) -> NDArray[np.float64]:
    """How far the intervals reach below and above, ``[2, n]``; below not to 0."""
    values = np.asarray(curve.distances)
    pairs = zip(curve.distances, curve.intervals, strict=True)
    low, high = np.asarray([(v, v) if i is None else i for v, i in pairs]).T
    return np.stack([np.clip(values - low, 0.0, 0.95 * values), high - values])


def map_scatter(noise: ArrayLike, exact: ArrayLike, student: ArrayLike) -> bytes:
    """Where a two-dimensional teacher and its student send the same noises.

    Left the noise, coloured by its angle; right where the exact map (circles) and the
    student (crosses) send each, in its own colour, the two joined by a line.

    Args:
      noise: ``[N, 2]``.
      exact: ``[N, 2]``, the end points of the teacher's exact trajectories.
      student: ``[N, 2]``, the student's.
    """
    noise, exact, student = (np.asarray(part) for part in (noise, exact, student))
    figure = Figure(figsize=(9.6, 5.0), dpi=144, layout="constrained")
    left, right = figure.subplots(1, 2)
    colour = {
        "c": np.arctan2(noise[:, 1], noise[:, 0]),
        "cmap": "twilight_shifted",
        "vmin": -np.pi,
        "vmax": np.pi,
    }
    edge = {"edgecolors": "#555555", "linewidths": 0.4}
    _dress(left, "The noise, coloured by angle", "", "")
    left.scatter(*noise.T, s=22, **colour, **edge)
    _dress(right, "Where each noise ends", "", "")
    joined = np.stack([exact, student])
    right.plot(joined[..., 0], joined[..., 1], color="#999999", linewidth=0.6, zorder=1)
    right.scatter(*exact.T, s=26, label="exact map", **colour, **edge)
    crosses = {"marker": "X", "label": "student, one step"}
    right.scatter(*student.T, s=30, **crosses, **colour, **edge)
    for axes in (left, right):
        axes.set_aspect("equal", adjustable="datalim")
    right.legend(frameon=False, loc="upper right")
    return _render(figure)
