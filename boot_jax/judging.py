"""What a run's samples are judged by: features, real images, and scores of images."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from boot_jax.config import ConfigError
from boot_jax.evaluation import paired
from boot_jax.evaluation.clip_score import ClipScorer
from boot_jax.evaluation.features import FeatureExtractor, get_features
from boot_jax.evaluation.lpips import Lpips
from boot_jax.evaluation.nearest import ShownSample, show_samples
from boot_jax.evaluation.paired import Judges, Pair, Scoring
from boot_jax.evaluation.reference import Measured, measure_once, read_reference
from boot_jax.evaluation.selftest import self_test
from boot_jax.run import Run
from boot_jax.sampling import to_images
from boot_jax.teachers.mixture import sample_mixture

# Real images that are read at once.
_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Judge:
    """How students of a teacher are scored, and what is to be told of it.

    Attributes:
      scoring: how.
      told: more for the results: ``data``, ``judges`` and, if asked for, ``selftest``.
    """

    scoring: Scoring
    told: dict[str, Any]


def judge_of(run: Run, pair: Pair, progress: Callable[[str], None]) -> Judge:
    """The judge that a run's config asks for.

    Args:
      run: whose.
      pair: of `boot_jax.trained`, for its teacher and its prompts.
      progress: told what is being done.
    """
    options, teacher = run.config.evaluation, run.teacher
    # Pixels are those of samples, which of a latent teacher are latents.
    reads_samples = options.features == "pixels"
    shape = teacher.sample_shape if reads_samples else teacher.image_shape
    features = get_features(options.features, shape, options, run.mesh)
    judges, names = _judges(run, pair)
    progress("reference")
    real = _reference(run, features)
    told: dict[str, Any] = {"judges": names}
    if options.selftest:
        told["selftest"] = _floor(run, real, progress)
    if real is None:
        told["data"] = "the teacher's own ODE samples: the config names no data"
    else:
        told["data"] = real.provenance["data"]
    scoring = Scoring(
        options=options,
        features=features,
        reference=real,
        mesh=run.mesh,
        progress=progress,
        judges=judges,
    )
    return Judge(scoring, told)


class Shown(NamedTuple):
    """Samples to look at.

    Attributes:
      rows: name to samples, in each row of the same noises; none of what is no image.
      note: why they have no neighbours; empty where they have.
    """

    rows: dict[str, list[ShownSample]]
    note: str = ""


def judge(
    run: Run, pair: Pair, progress: Callable[[str], None]
) -> tuple[dict[str, Any], Shown]:
    """Compares student and teacher as a run's config asks.

    Args:
      run: whose.
      pair: of `boot_jax.trained.trained_pair`.
      progress: told what is being done.

    Returns:
      The results of `boot_jax.evaluation.paired.compare`, with the data's provenance,
      and its samples with their neighbours.
    """
    judge = judge_of(run, pair, progress)
    results, rows = paired.compare(pair, judge.scoring)
    progress("nearest real images")
    scoring = judge.scoring
    shown = show(run, pair, scoring.features, scoring.reference, rows)
    return results | judge.told, shown


def show(
    run: Run,
    pair: Pair,
    features: FeatureExtractor,
    real: Measured | None,
    rows: Mapping[str, np.ndarray],
) -> Shown:
    """Samples with the real images that are nearest to them.

    Args:
      run: whose.
      pair: whose samples they are.
      features: what near is meant in.
      real: what they are compared with; None where there are no real images.
      rows: name to samples ``[n, *sample_shape]``, the first of the evaluation's seed.
    """
    decoder, shape = pair.teacher.decoder, pair.teacher.image_shape
    if shape[-1] not in (1, 3):
        size = "x".join(map(str, shape))
        return Shown({}, f"No samples are shown: they are {size}, and no images.")
    images = {name: to_images(decoder, samples) for name, samples in rows.items()}
    captions = _captions(run, pair, max(map(len, images.values()), default=0))
    k, note = run.config.evaluation.nearest_images, ""
    if k == 0:
        note = "evaluation.nearest_images is 0."
    elif real is None:
        note = "the config names no data."
    elif real.description is None or real.images is None:
        note = "of the reference only statistics are at hand."
    if real is None or real.description is None or real.images is None or note:
        plain = {
            name: [
                ShownSample(image=image, caption=caption)
                for image, caption in zip(own, captions, strict=False)
            ]
            for name, own in images.items()
        }
        return Shown(plain, f"No neighbours are shown: {note}")
    reads_samples = features.image_shape == pair.teacher.sample_shape
    described = {
        name: features.describe(rows[name] if reads_samples else images[name]).features
        for name in rows
    }
    found = show_samples(
        images, described, real.description.features, real.images, k, captions
    )
    return Shown(found)


def _captions(run: Run, pair: Pair, num: int) -> list[str]:
    """What the first images of an evaluation are of: prompts, classes or nothing."""
    condition = pair.condition(np.arange(num)) or {}
    if run.prompts is not None and pair.tokens is not None:
        texts, count = run.prompts.cache.text, len(pair.tokens)
        return [texts(index % count) for index in range(num)]
    if "label" in condition:
        return [f"class {label}" for label in condition["label"].tolist()]
    return [""] * num


def _floor(
    run: Run, real: Measured | None, progress: Callable[[str], None]
) -> dict[str, Any]:
    """What a perfect sampler would get."""
    if real is None:
        raise ConfigError(
            "evaluation.selftest needs real images, but data.name is empty; name data, "
            "or set evaluation.selftest=False"
        )
    progress("self-test")
    return self_test(real, run.config.evaluation)


def _reference(run: Run, features: FeatureExtractor) -> Measured | None:
    """What the samples are scored against; None for the teacher's own samples."""
    options = run.config.evaluation
    stored = None
    if options.statistics:
        stored = read_reference(options.statistics, features)
        if stored.description is not None:
            return stored
    found = _real_images(run)
    if found is None:
        return stored
    folder = run.workdir / "statistics"
    measured = dataclasses.replace(
        measure_once(folder, found.batches, features, found.data, found.count),
        images=found.images,
    )
    if stored is None:
        return measured
    # The file's own distance, and what it cannot give of the data.
    return dataclasses.replace(
        stored,
        description=measured.description,
        variance=measured.variance,
        images=measured.images,
    )


def _judges(run: Run, pair: Pair) -> tuple[Judges, dict[str, str]]:
    """Scores of single images, and the names of what gives them."""
    options, names = run.config.evaluation, {}
    judges = Judges()
    if "lpips" in options.metrics:
        perceptual = Lpips.from_file(options.lpips_weights, run.mesh)
        perceptual.check(run.teacher.image_shape)
        names["lpips"] = perceptual.name
        judges = dataclasses.replace(judges, perceptual=perceptual)
    if "clip_score" in options.metrics:
        if run.prompts is None or pair.tokens is None:
            raise ConfigError(
                "evaluation.metrics has 'clip_score', but this teacher takes no "
                "prompts; leave it out"
            )
        scorer = ClipScorer.from_folder(options.clip, run.mesh)
        texts, count = run.prompts.cache.text, len(pair.tokens)
        names["clip_score"] = scorer.name

        def matching(images: np.ndarray, indices: np.ndarray) -> np.ndarray:
            return scorer(images, [texts(int(i) % count) for i in indices])

        judges = dataclasses.replace(judges, matching=matching)
    return judges, names


class _Real(NamedTuple):
    """Batches of real images, what they are, how many, and any of them by indices."""

    batches: Iterator[np.ndarray]
    data: str
    count: int
    images: Callable[[np.ndarray], np.ndarray]


def _real_images(run: Run) -> _Real | None:
    most = run.config.evaluation.num_real
    if run.dataset is not None:
        dataset = run.dataset
        count = min(most, len(dataset))
        starts = range(0, count, _BATCH)
        chosen = (np.arange(start, min(start + _BATCH, count)) for start in starts)
        read = (dataset.images(indices) for indices in chosen)
        split = run.config.data.split
        told = f"{dataset.provenance}, split {split}, the first {count}"
        return _Real(read, told, count, dataset.images)
    if run.config.teacher.source == "mixture":
        key = jax.random.key(run.config.evaluation.seed, impl="threefry2x32")
        images = np.asarray(sample_mixture(run.teacher, key, most))
        told = f"{most} exact samples of the mixture"
        return _Real(iter([images]), told, most, images.__getitem__)
    return None
