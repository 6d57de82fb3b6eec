"""Coloured shapes with captions: a text-to-image data set of any size, and its judge.

Captions come from a small grammar,

    a [small | large] COLOUR SHAPE [at PLACE] [on BACKGROUND]

and what a caption leaves open is drawn: so one caption has many images. Image and
caption of an index are a pure function of the seed and that index.

`recognise` is a classifier that has learned nothing. An image of the data set is a
mixture of two colours,

    image = background + coverage * (foreground - background),                  (1)

so each template of a coverage (a shape at a place in a size) is fitted by least squares
for the two colours. The best template says which shape it is, and the fitted foreground
which colour.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

#: Side of an image in pixels.
SIDE = 16

#: RGB in [0, 1].
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.1),
    "purple": (0.65, 0.15, 0.8),
    "cyan": (0.1, 0.8, 0.9),
}
SHAPES = ("circle", "square", "triangle", "cross")
#: Half the width of a circle, in pixels; the others have about its area.
SIZES = {"small": 3.0, "large": 5.0}
#: Pixels from the middle of the image: down and to the right.
PLACES = {
    "left": (0, -3),
    "right": (0, 3),
    "top": (-3, 0),
    "bottom": (3, 0),
    "centre": (0, 0),
}
BACKGROUNDS = {"white": 1.0, "black": 0.0}

# A fit must explain this share of an image's variance to be the shape, and the next
# best shape must leave this many times as much unexplained.
_LEAST_EXPLAINED, _LEAST_MARGIN = 0.9, 1.1
# Distance in RGB within which a fitted colour is one of the palette, whose own colours
# are at least twice as far apart.
_COLOUR_RADIUS = 0.25


class Recognised(NamedTuple):
    """What an image shows; None for what is neither."""

    colour: str | None
    shape: str | None


class _Meaning(NamedTuple):
    """What a caption says; None for what it leaves open."""

    size: str | None
    colour: str
    shape: str
    place: str | None
    background: str | None


@functools.cache
def _meanings() -> dict[str, _Meaning]:
    parts = ((None, *SIZES), COLOURS, SHAPES, (None, *PLACES), (None, *BACKGROUNDS))
    meanings = {}
    for meaning in itertools.starmap(_Meaning, itertools.product(*parts)):
        words = ["a", meaning.size, meaning.colour, meaning.shape]
        words += ["at", meaning.place] if meaning.place else []
        words += ["on", meaning.background] if meaning.background else []
        meanings[" ".join(word for word in words if word)] = meaning
    return meanings


def captions() -> list[str]:
    """All distinct captions, in a fixed order: enough to distil from."""
    return list(_meanings())


def captions_of(indices: np.ndarray, seed: int = 0) -> list[str]:
    """The captions of the data set's ``indices [n]``, each of `captions` as likely."""
    known = captions()
    chosen = _uniform(indices, seed, 0) * len(known)
    return [known[index] for index in chosen.astype(int).tolist()]


def images_of(given: Sequence[str], indices: np.ndarray, seed: int = 0) -> np.ndarray:
    """Images of captions; what a caption leaves open is drawn by seed and index.

    Args:
      given: ``n`` captions, each of `captions`.
      indices: ``[n]``, which image of its caption each is.
      seed: of all draws.

    Returns:
      ``[n, SIDE, SIDE, 3]`` float32 in [-1, 1].

    Raises:
      KeyError: a caption that the grammar does not make.
    """
    meanings = [_meanings()[caption] for caption in given]
    draws = [_uniform(indices, seed, stream) for stream in range(1, 4)]
    radius = np.array(_drawn(SIZES, [m.size for m in meanings], draws[0]))
    place = np.array(_drawn(PLACES, [m.place for m in meanings], draws[1]))
    ground = np.array(_drawn(BACKGROUNDS, [m.background for m in meanings], draws[2]))
    row, column = (SIDE - 1) / 2 + place.T
    coverage = np.zeros((len(meanings), SIDE, SIDE))
    for shape in SHAPES:
        of_shape = np.array([meaning.shape == shape for meaning in meanings], bool)
        coverage[of_shape] = _coverage(
            shape, row[of_shape], column[of_shape], radius[of_shape]
        )
    ground = ground[:, None, None, None]
    colour = np.reshape([COLOURS[m.colour] for m in meanings], (-1, 1, 1, 3))
    images = ground + coverage[..., None] * (colour - ground)
    return (2 * images - 1).astype(np.float32)


def recognise(images: np.ndarray) -> list[Recognised]:
    """Colour and shape of images ``[n, SIDE, SIDE, 3]`` in [-1, 1], by eq. (1)."""
    pixels = np.clip(np.asarray(images, np.float32) / 2 + 0.5, 0, 1)
    pixels = pixels.reshape(len(pixels), -1, 3)
    templates, shapes = _templates()
    mean = pixels.mean(1, keepdims=True)
    total = ((pixels - mean) ** 2).sum((1, 2))
    middle = templates.mean(1, keepdims=True)
    centred = templates - middle
    power = (centred**2).sum(1)
    # Least squares of a line: the covariance of template and pixels by the template's.
    products = np.tensordot(pixels - mean, centred, (1, 1)).swapaxes(1, 2)
    slopes = products / power[:, None]
    explained = (slopes**2).sum(-1) * power / np.maximum(total, 1e-12)[:, None]
    best = explained.argmax(1)
    return [
        Recognised(
            _colour(mean[n, 0] + slopes[n, t] * (1 - middle[t, 0])),
            _shape(explained[n], shapes),
        )
        for n, t in enumerate(best.tolist())
    ]


def accuracy(images: np.ndarray, given: Sequence[str]) -> float:
    """The share of images that show both colour and shape of their caption."""
    right = [
        found == (_meanings()[caption].colour, _meanings()[caption].shape)
        for found, caption in zip(recognise(images), given, strict=True)
    ]
    return float(np.mean(right))


def diversity(images: np.ndarray, given: Sequence[str]) -> float:
    """How far images of one caption are apart; 1 is as far as those of the data set.

    The mean distance (root mean square over pixels) of all pairs of images that share a
    caption, over the same of `images_of` these captions.

    Args:
      images: ``[n, SIDE, SIDE, 3]`` in [-1, 1].
      given: ``n`` captions, some of them equal, and such as leave something open.
    """
    real = images_of(given, np.arange(len(given)), seed=1)
    names = np.asarray(given)
    pairs = np.triu(names[:, None] == names, 1).nonzero()

    def mean_distance(images: np.ndarray) -> float:
        difference = images[pairs[0]] - images[pairs[1]]
        return float(np.sqrt((difference**2).mean((1, 2, 3))).mean())

    return mean_distance(images) / mean_distance(real)


def _colour(rgb: np.ndarray) -> str | None:
    distances = {
        name: float(np.linalg.norm(rgb - known)) for name, known in COLOURS.items()
    }
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] < _COLOUR_RADIUS else None


def _shape(explained: np.ndarray, shapes: np.ndarray) -> str | None:
    best = {name: float(explained[shapes == name].max()) for name in SHAPES}
    first, second = sorted(best, key=best.__getitem__, reverse=True)[:2]
    clear = 1 - best[second] > _LEAST_MARGIN * (1 - best[first])
    return first if clear and best[first] > _LEAST_EXPLAINED else None


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Coverages ``[T, SIDE * SIDE]`` on a grid of places and sizes, and their names."""
    places = (SIDE - 1) / 2 + np.arange(-4, 4.5, 0.5)
    radii = np.arange(min(SIZES.values()) - 0.5, max(SIZES.values()) + 1, 0.5)
    grid = [axis.ravel() for axis in np.meshgrid(places, places, radii)]
    coverages = [_coverage(shape, *grid) for shape in SHAPES]
    templates = np.concatenate(coverages).reshape(-1, SIDE * SIDE).astype(np.float32)
    return templates, np.repeat(SHAPES, len(grid[0]))


def _drawn(
    choices: Mapping[str, Any], given: Sequence[str | None], draws: np.ndarray
) -> list[Any]:
    """What names stand for; where there is no name, any of the choices."""
    every = list(choices.values())
    return [
        every[int(draw * len(every))] if name is None else choices[name]
        for name, draw in zip(given, draws, strict=True)
    ]


def _coverage(
    shape: str, row: np.ndarray, column: np.ndarray, radius: np.ndarray
) -> np.ndarray:
    """How much of each pixel a shape covers, ``[n, SIDE, SIDE]`` in [0, 1].

    By the distance of the pixel's centre from the outline, as over a straight edge.
    """
    r = radius[:, None, None]
    y = np.arange(SIDE)[None, :, None] - row[:, None, None]
    x = np.arange(SIDE)[None, None, :] - column[:, None, None]

    def box(half_height: np.ndarray, half_width: np.ndarray) -> np.ndarray:
        return np.maximum(abs(y) - half_height, abs(x) - half_width)

    if shape == "circle":
        distance = np.hypot(x, y) - r
    elif shape == "square":
        distance = box(0.9 * r, 0.9 * r)
    elif shape == "cross":
        distance = np.minimum(box(1.2 * r, 0.4 * r), box(0.4 * r, 1.2 * r))
    else:  # a triangle with one side at the bottom
        sides = abs(x) * np.sqrt(0.75) - y / 2
        distance = np.maximum(y, sides) - 0.7 * r
    return np.clip(0.5 - distance, 0, 1)


def _uniform(indices: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """A number in [0, 1) for each index: splitmix64 (Steele et al., OOPSLA 2014)."""
    words = np.asarray(indices, np.uint64) * np.uint64(8) + np.uint64(stream)
    words = words + (np.asarray([seed], np.uint64) << np.uint64(40))
    words = (words + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words = words ^ (words >> np.uint64(31))
    return (words >> np.uint64(11)).astype(np.float64) / 2.0**53
