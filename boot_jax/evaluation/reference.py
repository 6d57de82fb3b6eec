"""What samples are compared with: statistics of real images, and where they are from.

Read are ``.npz`` files with the mean ``mu`` and covariance ``sigma`` of features, as
pytorch-fid and clean-fid write them, and with ``mu_s`` and ``sigma_s`` of spatial
features, as ADM does. Those that are written here also hold the features themselves,
and ``provenance``, a JSON text: data, count, image shape and features, the last with
the hash of the network's weights, resizing and rounding. A file with provenance is
refused where it does not fit; of one without, only the width can be checked.
"""

import dataclasses
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boot_jax import distributed
from boot_jax.evaluation.features import Description, FeatureError, FeatureExtractor
from boot_jax.evaluation.frechet import FeatureStatistics, Moments
from boot_jax.evaluation.metrics import TotalVariance

# To be raised when the same images would be described otherwise.
_FORMAT = 1


class Samples:
    """Images described batch by batch; memory holds their features, not the images."""

    def __init__(self, extractor: FeatureExtractor, *, keep_spatial: bool = True):
        """What describes them; without ``keep_spatial`` only those moments are kept."""
        self._extractor, self._keep_spatial = extractor, keep_spatial
        self._moments, self._spatial_moments = Moments(), Moments()
        self._variance = TotalVariance()
        self._parts: list[Description] = []

    def add(self, images: NDArray[Any]) -> None:
        """Adds a batch ``[n, H, W, C]`` in [-1, 1]."""
        found = self._extractor.describe(images)
        self._moments.update(found.features)
        self._variance.update(images)
        if found.spatial is not None:
            self._spatial_moments.update(found.spatial)
            if not self._keep_spatial:
                found = found._replace(spatial=None)
        self._parts.append(found)

    @property
    def count(self) -> int:
        """Images so far."""
        return self._moments.count

    def measured(self, **provenance: Any) -> "Measured":
        """All images so far, with whatever is to be told of them."""
        parts = self._parts
        spatial = [part.spatial for part in parts if part.spatial is not None]
        logits = [part.logits for part in parts if part.logits is not None]
        description = Description(
            np.concatenate([part.features for part in parts]),
            np.concatenate(spatial) if spatial else None,
            np.concatenate(logits) if logits else None,
        )
        has_spatial = self._spatial_moments.count > 0
        return Measured(
            statistics=self._moments.statistics(),
            spatial=self._spatial_moments.statistics() if has_spatial else None,
            description=description,
            variance=self._variance.value(),
            provenance=provenance,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """A set of images as features have it: samples, or what they are compared with.

    Attributes:
      statistics: of their features.
      spatial: of their spatial features; None where there are none.
      description: the features themselves; None of a file that has none, and then
        nothing that compares images one by one can be had.
      variance: their total variance; None where it is not known.
      provenance: where they are from.
      images: gives the images that rows of ``description`` are of; None where they are
        not at hand.
    """

    statistics: FeatureStatistics
    spatial: FeatureStatistics | None = None
    description: Description | None = None
    variance: float | None = None
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    images: Callable[[NDArray[Any]], NDArray[Any]] | None = None


def measure(
    batches: Iterable[NDArray[Any]],
    extractor: FeatureExtractor,
    data: str,
    **provenance: Any,
) -> Measured:
    """The reference that images make, which are read once and not kept.

    Args:
      batches: of images ``[n, H, W, C]`` in [-1, 1].
      extractor: of features.
      data: what the images are, in words.
      provenance: more to be told of them.
    """
    samples = Samples(extractor, keep_spatial=False)
    for batch in batches:
        samples.add(batch)
    told = _expected(extractor) | {"data": data, "count": samples.count}
    return samples.measured(**told, **provenance)


def measure_once(
    folder: Path,
    batches: Iterable[NDArray[Any]],
    extractor: FeatureExtractor,
    data: str,
    count: int,
) -> Measured:
    """The reference that images make, out of a folder if it is there already.

    It is known by features, data, count and the pixels of the first batch, which is
    read for that.

    Args:
      folder: of statistics; made if it is not there.
      batches, extractor, data: see `measure`.
      count: of the images in all batches.
    """
    remaining = iter(batches)
    first = next(remaining)
    pixels = hashlib.sha256(np.ascontiguousarray(first).tobytes()).hexdigest()[:12]
    told = _expected(extractor) | {"data": data, "count": count, "pixels": pixels}
    text = json.dumps([_FORMAT, told], sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
    if distributed.on_main(path.is_file):
        return read_reference(path, extractor)

    def all_batches() -> Iterable[NDArray[Any]]:
        yield first
        yield from remaining

    found = measure(all_batches(), extractor, data, pixels=pixels)
    distributed.on_main(lambda: write_reference(path, found))
    return found


def _expected(extractor: FeatureExtractor) -> dict[str, Any]:
    return {
        "features": extractor.name,
        "image_shape": "x".join(map(str, extractor.image_shape)),
    }


def write_reference(path: str | os.PathLike[str], reference: Measured) -> None:
    """Writes an ``.npz`` that other programs read, too; whole or not at all."""
    path = Path(path)
    statistics, spatial = reference.statistics, reference.spatial
    arrays: dict[str, Any] = {"mu": statistics.mean, "sigma": statistics.covariance}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    if reference.description is not None:
        arrays["features"] = reference.description.features
        if reference.description.logits is not None:
            arrays["logits"] = reference.description.logits
    if reference.variance is not None:
        arrays["variance"] = reference.variance
    arrays["provenance"] = json.dumps(reference.provenance, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.npz")
    try:
        np.savez(unfinished, **arrays)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_reference(
    path: str | os.PathLike[str], extractor: FeatureExtractor
) -> Measured:
    """Reads statistics that were taken with this extractor.

    Raises:
      FeatureError: there is no such file, it cannot be read, or it is of other
        features, of images of another shape, or of another width; in one line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FeatureError(f"there are no statistics {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        provenance = json.loads(str(arrays.get("provenance", "{}")))
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise FeatureError(f"{path} cannot be read as statistics: {error}") from error
    if missing := {"mu", "sigma"} - set(arrays):
        raise FeatureError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}, but statistics "
            f"hold mu and sigma; it lacks {', '.join(sorted(missing))}"
        )
    _check(path, provenance, extractor)
    count = provenance.get("count")
    statistics = _statistics(path, arrays["mu"], arrays["sigma"], count)
    spatial = None
    if {"mu_s", "sigma_s"} <= set(arrays):
        spatial = _statistics(path, arrays["mu_s"], arrays["sigma_s"], count)
    _check_width(path, statistics, spatial, extractor)
    description = None
    if "features" in arrays:
        description = Description(arrays["features"], None, arrays.get("logits"))
    return Measured(
        statistics=statistics,
        spatial=spatial,
        description=description,
        variance=float(arrays["variance"]) if "variance" in arrays else None,
        provenance={"data": f"statistics {path.name}", **provenance},
    )


def _statistics(
    path: Path, mean: NDArray[Any], covariance: NDArray[Any], count: int | None
) -> FeatureStatistics:
    try:
        return FeatureStatistics(
            mean.astype(np.float64), covariance.astype(np.float64), count
        )
    except ValueError as error:
        raise FeatureError(f"{path}: {error}") from error


def _check(path: Path, told: dict[str, Any], extractor: FeatureExtractor) -> None:
    names = {"image_shape": "images", "features": "features"}
    for key, wanted in _expected(extractor).items():
        if told.get(key, wanted) != wanted:
            raise FeatureError(
                f"{path} are statistics of {names[key]} {told[key]}, but the samples' "
                f"are {wanted}; take statistics of the same, or leave "
                "evaluation.statistics empty"
            )


def _check_width(
    path: Path,
    statistics: FeatureStatistics,
    spatial: FeatureStatistics | None,
    extractor: FeatureExtractor,
) -> None:
    blank = np.zeros((1, *extractor.image_shape), np.float32)
    described = extractor.describe(blank)
    widths = {"features": (statistics, described.features)}
    if spatial is not None and described.spatial is not None:
        widths["spatial features"] = (spatial, described.spatial)
    for name, (found, own) in widths.items():
        if len(found.mean) != own.shape[1]:
            raise FeatureError(
                f"{path} are statistics of {len(found.mean)} {name}, but those of "
                f"{extractor.name} are {own.shape[1]}; they are of another network"
            )
