"""What students are shown: real images of the right kind, or a refusal."""

import dataclasses
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest

from boot_jax.config import ConfigError, default_config
from boot_jax.data import load
from boot_jax.run import Run
from boot_jax.sharding import create_mesh
from boot_jax.student_batches import batch_shapes, batches_of
from boot_jax.teachers.base import Decoder, Teacher
from boot_jax.teachers.mixture import gaussian_mixture
from boot_jax.tokenizers import WordTokenizer

DIGITS, SHAPES = load("digits"), load("shapes")


def run_of(teacher: Teacher | None = None, **fields) -> Run:
    config = default_config()
    config.teacher.source = "checkpoint"
    config.objective.kind = "consistency"
    config.distill.batch_size = 16
    config.update_from_flattened_dict(
        {path.replace("__", "."): value for path, value in fields.items()}
    )
    run = Run(config, pathlib.Path(), create_mesh())
    if teacher is not None:
        run.__dict__["teacher"] = teacher
    return run


def teacher_of(shape=(8, 8, 1), **fields) -> Teacher:
    teacher = gaussian_mixture(np.zeros((1, *shape)), [0.5], run_of().schedule)
    return dataclasses.replace(teacher, **fields)


def check_shapes(run: Run, batches) -> None:
    expected = batch_shapes(run)
    for leading, batch in batches:
        assert batch.keys() == expected.keys()
        for name, leaf in batch.items():
            assert leaf.shape == (leading, *expected[name].shape)
            assert leaf.dtype == expected[name].dtype


def test_images_come_with_the_labels_that_the_teacher_takes():
    for classes, names in ((None, {"image"}), (10, {"image", "label"})):
        run = run_of(teacher_of(num_classes=classes))
        batches = batches_of(run)
        batch = next(batches(4, 2))
        assert set(batch) == names
        check_shapes(run, [(2, batch), (1, next(batches(0, 1)))])
        # They are the data's own, in an order of seed and step alone.
        np.testing.assert_array_equal(
            batch["image"][1], next(batches(5, 1))["image"][0]
        )
        own = DIGITS.images(np.arange(len(DIGITS))).reshape(len(DIGITS), -1)
        first = np.asarray(batch["image"][0, 0]).ravel()
        (index,) = np.flatnonzero((own == first).all(1))
        if classes:
            assert batch["label"][0, 0] == DIGITS.labels(np.array([index]))[0]


def test_images_come_with_the_captions_that_the_teacher_reads():
    words = WordTokenizer.from_prompts(SHAPES.captions(np.arange(200)))
    text = SimpleNamespace(tokenizer=words)
    run = run_of(teacher_of(SHAPES.image_shape, text=text), data__name="shapes")
    batch = next(batches_of(run)(0, 1))
    check_shapes(run, [(1, batch)])
    assert set(batch) == {"image", "tokens"}
    other = run_of(teacher_of(text=text))
    with pytest.raises(ConfigError, match=r"images with their captions, but .* has no"):
        batches_of(other)


def test_a_mixture_brings_exact_samples_of_its_own():
    fields = {
        "data__name": "",
        "teacher__source": "mixture",
        "teacher__mixture__means": ((1.0, 0.0), (-1.0, 0.5)),
        "teacher__mixture__scales": (0.01, 0.01),
    }
    run = run_of(**fields)
    batches = batches_of(run)
    batch = next(batches(6, 3))
    check_shapes(run, [(3, batch)])
    np.testing.assert_array_equal(batch["image"][2], next(batches(8, 1))["image"][0])
    points = np.asarray(batch["image"]).reshape(-1, 2)
    means = np.array([[1.0, 0.0], [-1.0, 0.5]])
    distance = np.linalg.norm(points[:, None] - means, axis=-1)
    assert distance.min(1).max() < 0.06
    assert 0.2 < np.mean(distance.argmin(1)) < 0.8
    assert len(np.unique(points, axis=0)) == len(points)


def test_kinds_without_images_are_shown_none():
    for kind in ("boot", "continuous", "pid", "direct"):
        run = run_of(teacher_of(), objective__kind=kind)
        assert batches_of(run) is None and batch_shapes(run) is None


def test_what_has_no_images_is_refused_in_one_line():
    latent = Decoder(decode=lambda params, x: x, params={}, image_shape=(8, 8, 1))
    cases = [
        (
            teacher_of(decoder=latent),
            "no encoder here; choose boot, continuous, pid or",
        ),
        (teacher_of(num_classes=3), "has 10 classes and the teacher 3"),
    ]
    for teacher, words in cases:
        with pytest.raises(ConfigError) as refusal:
            batches_of(run_of(teacher))
        message = str(refusal.value)
        assert words in message and "consistency" in message and "\n" not in message
