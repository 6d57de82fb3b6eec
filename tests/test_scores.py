"""Figures by choice, reference statistics in files, and the self-test."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from boot_jax.config import ConfigError, default_config
from boot_jax.evaluation.classes import inception_score
from boot_jax.evaluation.features import Description, FeatureError, get_features
from boot_jax.evaluation.frechet import feature_statistics, frechet_distance
from boot_jax.evaluation.kernel import kernel_distance
from boot_jax.evaluation.neighbours import (
    density_coverage,
    mean_pairwise_distance,
    precision_recall,
)
from boot_jax.evaluation.options import check_options
from boot_jax.evaluation.reference import (
    Samples,
    measure,
    measure_once,
    read_reference,
    write_reference,
)
from boot_jax.evaluation.scores import METRICS, score, warnings_of
from boot_jax.evaluation.selftest import self_test, sentence

SHAPE = (2, 3, 1)
ALL = tuple(name for name in METRICS if name not in ("lpips", "clip_score"))


class Wide:
    """A stand-in's features with all three parts, each a fixed map of the pixels."""

    name, distance_name, image_shape = "wide", "Fréchet distance", SHAPE

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self._maps = [rng.normal(size=(6, width)) for width in (5, 4, 3)]

    def describe(self, images):
        flat = np.asarray(images, np.float64).reshape(len(images), -1)
        return Description(*(flat @ matrix for matrix in self._maps))


def images_of(seed, count, scale=1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)) * scale


def options_of(**changes: Any) -> dict[str, Any]:
    given = {"metrics": ALL, "inception_splits": 2, "num_images": 80} | changes
    return default_config().evaluation.to_dict() | given


def measured(images, extractor=None, batch=16):
    samples = Samples(extractor or Wide())
    for start in range(0, len(images), batch):
        samples.add(images[start : start + batch])
    return samples.measured()


def test_figures_are_those_of_their_functions():
    real, made = images_of(0, 90), images_of(1, 70, 0.8)
    reference, samples = measured(real), measured(made)
    found = score(reference, samples, options_of(), teacher=reference).as_dict()
    a, b = Wide().describe(real), Wide().describe(made)
    expected = {
        "frechet_distance": frechet_distance(
            feature_statistics(a.features), feature_statistics(b.features)
        ),
        "spatial_frechet_distance": frechet_distance(
            feature_statistics(a.spatial), feature_statistics(b.spatial)
        ),
        "inception_score": inception_score(b.logits, 2).value,
        "inception_score_deviation": inception_score(b.logits, 2).deviation,
        "kernel_distance": kernel_distance(a.features, b.features).value,
        "mean_pairwise_distance": mean_pairwise_distance(b.features),
        **precision_recall(a.features, b.features, 3)._asdict(),
        **density_coverage(a.features, b.features, 5)._asdict(),
    }
    expected["recall_of_teacher"] = expected["recall"]
    intervals = found.pop("intervals")
    assert found == pytest.approx(expected, rel=1e-9)
    assert set(intervals) == set(expected) - {"inception_score_deviation"}
    for name, (low, high) in intervals.items():
        assert low <= found[name] <= high
        assert high - low > 0
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("batch", [1, 7, 70])
def test_figures_do_not_depend_on_batches_or_order(batch):
    real, made = images_of(0, 90), images_of(1, 70)
    options = options_of(inception_splits=1)
    expected = score(measured(real), measured(made), options).as_dict()
    shuffled = np.random.default_rng(batch).permutation(made)
    found = score(measured(real, batch=batch), measured(shuffled, batch=batch), options)
    for name, value in found.as_dict().items():
        if name == "intervals":
            for key, ends in value.items():
                np.testing.assert_allclose(ends, expected[name][key], rtol=1e-8)
        else:
            assert value == pytest.approx(expected[name], rel=1e-8)


def test_only_what_is_asked_for_is_computed():
    reference, samples = measured(images_of(0, 90)), measured(images_of(1, 70))
    options = options_of(metrics=(), bootstrap=0)
    assert set(score(reference, samples, options).as_dict()) == {"frechet_distance"}
    options = options_of(metrics=("kernel_distance",), kernel_subset_size=30)
    found = score(reference, samples, options).as_dict()
    assert found["kernel_distance_deviation"] > 0
    assert set(found["intervals"]) == {"frechet_distance"}


def test_too_few_images_for_the_rank_are_warned_of():
    many, few = measured(images_of(0, 90)), measured(images_of(1, 5))
    assert warnings_of(many, many, options_of()) == []
    (warning,) = warnings_of(many, few, options_of())
    assert warning.startswith("the samples are 5") and "at least 6 images" in warning
    assert len(warnings_of(few, few, options_of())) == 2


def test_figures_that_are_left_out_are_warned_of():
    whole = measured(images_of(0, 90))
    bare = dataclasses.replace(whole, description=None, spatial=None)
    first, second = warnings_of(bare, whole, options_of())
    assert first.startswith("left out: precision_recall, density_coverage, kernel_")
    assert second.startswith("left out: spatial_frechet_distance")
    assert warnings_of(bare, whole, options_of(metrics=("diversity",))) == []


# --- reference statistics


def test_statistics_are_written_and_read_with_their_provenance(tmp_path):
    images = images_of(0, 50)
    extractor = Wide()
    found = measure(np.split(images, [20]), extractor, "noise", split="train")
    path = tmp_path / "statistics" / "noise.npz"
    write_reference(path, found)
    assert [file.name for file in path.parent.iterdir()] == ["noise.npz"]
    again = read_reference(path, extractor)
    assert again.provenance == found.provenance
    assert found.provenance == {
        "data": "noise",
        "count": 50,
        "split": "train",
        "features": "wide",
        "image_shape": "2x3x1",
    }
    np.testing.assert_array_equal(again.statistics.mean, found.statistics.mean)
    samples = measured(images_of(1, 40))
    first, second = (score(r, samples, options_of()).as_dict() for r in (found, again))
    assert first == second
    assert again.variance == pytest.approx(images.reshape(50, -1).var(0).sum())


def test_files_of_other_programs_are_read(tmp_path):
    extractor, images = Wide(), images_of(0, 60)
    described = extractor.describe(images)
    mu, sigma = described.features.mean(0), np.cov(described.features, rowvar=False)
    fid, adm = tmp_path / "fid.npz", tmp_path / "adm.npz"
    np.savez(fid, mu=mu.astype(np.float32), sigma=sigma)  # pytorch-fid, clean-fid
    spatial = described.spatial
    np.savez(
        adm,
        arr_0=np.zeros((3, 2, 2, 3), np.uint8),
        mu=mu,
        sigma=sigma,
        mu_s=spatial.mean(0),
        sigma_s=np.cov(spatial, rowvar=False),
    )
    samples = measured(images_of(1, 50))
    whole = score(measured(images), samples, options_of()).as_dict()
    for path, has_spatial in ((fid, False), (adm, True)):
        reference = read_reference(path, extractor)
        assert reference.description is None and reference.statistics.count is None
        assert path.name in reference.provenance["data"]
        found = score(reference, samples, options_of()).as_dict()
        wanted = whole["frechet_distance"]
        assert found["frechet_distance"] == pytest.approx(wanted, rel=1e-5)
        assert ("spatial_frechet_distance" in found) == has_spatial
        assert "precision" not in found and "kernel_distance" not in found
    np.savez(fid, mu=mu, sigma=sigma)
    other = get_features("pixels", SHAPE)
    with pytest.raises(FeatureError, match=r"5 features, but those of pixels .* are 6"):
        read_reference(fid, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_shape": (4, 3, 1)}, "images 2x3x1, but the samples' are 4x3x1"),
        ({"name": "InceptionV3 (clean)"}, "features wide, but the samples' are Incep"),
    ],
)
def test_statistics_of_something_else_are_refused(tmp_path, change, message):
    path = tmp_path / "a.npz"
    write_reference(path, measure([images_of(0, 50)], Wide(), "noise"))
    other: Any = Wide()
    for name, value in change.items():
        setattr(other, name, value)
    with pytest.raises(FeatureError, match=message) as error:
        read_reference(path, other)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(5)}, "holds mu, but .* it lacks sigma"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "holds arr_0"),
        ({"mu": np.zeros(5), "sigma": np.eye(4)}, r"\[5\] and \[4, 4\]"),
        ({"mu": np.full(5, np.nan), "sigma": np.eye(5)}, "must be finite"),
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, "9 features.*are of another network"),
        ({"mu": np.zeros(5), "sigma": [{}]}, "cannot be read as statistics"),
    ],
)
def test_bad_statistics_are_refused_in_one_line(tmp_path, arrays, message):
    path = tmp_path / "bad.npz"
    np.savez(path, allow_pickle=True, **arrays)
    with pytest.raises(FeatureError, match=message) as error:
        read_reference(path, Wide())
    assert "\n" not in str(error.value) and "bad.npz" in str(error.value)


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(FeatureError, match="there are no statistics"):
        read_reference(tmp_path / "no.npz", Wide())
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(FeatureError, match="cannot be read as statistics"):
        read_reference(tmp_path / "bad.npz", Wide())


def test_a_reference_is_measured_once(tmp_path):
    images, extractor = images_of(0, 60), Wide()
    reads = []

    def batches(pixels):
        for part in np.split(pixels, 3):
            reads.append(len(part))
            yield part

    first = measure_once(tmp_path, batches(images), extractor, "noise", 60)
    assert reads == [20, 20, 20]
    again = measure_once(tmp_path, batches(images), extractor, "noise", 60)
    assert reads == [20] * 4, "the first batch alone is looked at"
    np.testing.assert_array_equal(first.statistics.mean, again.statistics.mean)
    # Other pixels, data or features are another reference.
    measure_once(tmp_path, batches(images + 1), extractor, "noise", 60)
    measure_once(tmp_path, batches(images), extractor, "other", 60)
    renamed: Any = Wide()
    renamed.name = "other"
    measure_once(tmp_path, batches(images), renamed, "noise", 60)
    assert len(list(tmp_path.glob("*.npz"))) == 4


# --- self-test


def test_a_self_test_finds_the_floor():
    real = measured(images_of(0, 800))
    options = options_of(num_images=300)
    found = self_test(real, options)
    assert (found["num_reference"], found["num_images"]) == (400, 300)
    # Of one law: far from what a wrong sampler gets, near 0 when extrapolated.
    wrong = score(real, measured(images_of(3, 300, 0.7)), options).figures
    assert 0 < found["frechet_distance"] < 0.2 * wrong["frechet_distance"]
    assert abs(found["frechet_distance_infinite"]) < found["frechet_distance"]
    assert found["precision"] > 0.85 and found["recall"] > 0.85
    assert found["coverage"] > 0.85
    assert set(found["intervals"]) >= {"frechet_distance", "precision", "recall"}
    assert found == self_test(real, options)
    text = sentence(found, "FID")
    assert text.startswith("a perfect sampler would get: FID ") and "300 images" in text
    assert "extrapolated" in text and "\n" not in text


def test_a_self_test_needs_images():
    with pytest.raises(FeatureError, match="40 real images at least"):
        self_test(measured(images_of(0, 39)), options_of())


# --- options

SPLIT = {"features": "inception", "weights": "w", "metrics": ("inception_score",)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "inceptoin"}, "evaluation.features is .* mean 'inception'"),
        ({"features": "inception"}, "evaluation.weights is empty; .*pytorch-fid"),
        ({"resize": "bicubic"}, "evaluation.resize is 'bicubic'"),
        ({"metrics": ("fid",)}, "evaluation.metrics is 'fid'"),
        ({"metrics": ("inception_score",)}, "needs evaluation.features='inception'"),
        ({"metrics": ("lpips",)}, "evaluation.lpips_weights is empty"),
        ({"metrics": ("clip_score",)}, "evaluation.clip is empty"),
        ({"bootstrap": -1}, "evaluation.bootstrap is -1"),
        ({"kernel_subset_size": -1}, "evaluation.kernel_subset_size is -1"),
        (SPLIT | {"inception_splits": 0}, "evaluation.inception_splits is 0"),
        (SPLIT | {"inception_splits": 3000}, "between 1 and .*num_images = 2048"),
    ],
)
def test_options_that_cannot_be_done_are_refused(changes, message):
    config = default_config()
    check_options(config)
    config.evaluation.update(changes)
    with pytest.raises(ConfigError, match=message) as error:
        check_options(config)
    assert "\n" not in str(error.value)
