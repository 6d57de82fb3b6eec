"""How figures are called, in which order they stand, and with how many decimals."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from boot_jax.evaluation.pages import EN_DASH, Cell


class Column(NamedTuple):
    """Of a table of figures.

    Attributes:
      above, below: the header's two lines, which keep the terminal's table narrow.
      form: how a number is written.
    """

    above: str
    below: str
    form: str

    @property
    def title(self) -> str:
        """The header in one line."""
        return f"{self.above} {self.below}".strip()

    @property
    def name(self) -> str:
        """The same without the arrow that says which way is better."""
        return self.title.strip(" ↓↑")


_ALWAYS = {
    "frechet_distance": Column("Fréchet", "distance ↓", ".3f"),
    "normalized_error": Column("normalised", "error ↓", ".4f"),
    "precision": Column("", "precision ↑", ".3f"),
    "recall": Column("", "recall ↑", ".3f"),
}

#: Figures with a column only where there are any.
MORE_FIGURES = {
    "density": Column("", "density ↑", ".3f"),
    "coverage": Column("", "coverage ↑", ".3f"),
    "kernel_distance": Column("kernel", "distance ↓", ".5f"),
    "spatial_frechet_distance": Column("spatial", "Fréchet ↓", ".3f"),
    "inception_score": Column("inception", "score ↑", ".2f"),
    "mean_pairwise_distance": Column("pairwise", "distance", ".3f"),
    "recall_of_teacher": Column("recall of", "teacher ↑", ".3f"),
    "lpips": Column("", "LPIPS ↓", ".4f"),
    "clip_score": Column("CLIP", "score ↑", ".2f"),
}

# With features of InceptionV3 they have names of their own.
_OF_INCEPTION = {
    "frechet_distance": Column("", "FID ↓", ".3f"),
    "kernel_distance": Column("", "KID ↓", ".5f"),
    "spatial_frechet_distance": Column("", "sFID ↓", ".3f"),
}


def columns_of(distance_name: str | None, there: Iterable[str]) -> dict[str, Column]:
    """The figures to show, in their order.

    Args:
      distance_name: what the features call a Frechet distance.
      there: names of figures that there are.
    """
    found = set(there)
    shown = _ALWAYS | {k: v for k, v in MORE_FIGURES.items() if k in found}
    if distance_name == "FID":
        shown |= {k: v for k, v in _OF_INCEPTION.items() if k in shown}
    return shown


def number(value: float | None, form: str) -> str:
    """A figure as text; an en dash for none."""
    return EN_DASH if value is None else format(value, form)


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds of three digits."""
    if seconds is None:
        return EN_DASH
    form = ",.0f" if seconds >= 0.1 else "#.3g"
    return format(1e3 * seconds, form).rstrip(".")


def cell_of(value: float | None, interval: Sequence[float] | None, form: str) -> Cell:
    """A figure with the ends of its interval, None where it has none."""
    ends = "" if not interval else " to ".join(format(end, form) for end in interval)
    is_known = value is not None and math.isfinite(value)
    return Cell(number(value, form), ends, value if is_known else None)


def figure_cell(scores: Mapping[str, Any], name: str, form: str) -> Cell:
    """A figure among others, with its interval, or what subsets of images scatter."""
    value, deviation = scores.get(name), scores.get(f"{name}_deviation")
    interval = (scores.get("intervals") or {}).get(name)
    cell = cell_of(value, interval, form)
    if interval is None and deviation is not None:
        cell = cell._replace(interval=f"± {deviation:{form}} between subsets")
    return cell
