"""The drawn shapes: what captions say is what images show, and the judge sees it."""

import importlib.util
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from scipy.ndimage import gaussian_filter

from boot_jax import pipeline, shapes
from boot_jax.batches import batches
from boot_jax.data import DataError, load
from boot_jax.run import Run
from boot_jax.sharding import AXES
from boot_jax.tokenizers import WordTokenizer
from boot_jax.workdir import open_workdir

ROOT = pathlib.Path(__file__).parents[1]

#: Least share of right colours, least accuracy and least diversity.
MARKS = [("teacher", 0.6, 0.15, 0.5), ("student", 0.6, 0.1, 0.4)]


def module_of(folder: str) -> Any:
    """Of the shapes, in a folder that is no package."""
    path = ROOT / folder / "shapes.py"
    spec = importlib.util.spec_from_file_location(f"{folder}_shapes", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn():
    indices = np.arange(600)
    captions = shapes.captions_of(indices)
    return captions, shapes.images_of(captions, indices)


def test_captions_are_distinct_sentences_of_few_words():
    captions = shapes.captions()
    assert len(set(captions)) == len(captions) == 3 * 6 * 4 * 6 * 3
    assert {"a red circle", "a small blue cross at left on black"} <= set(captions)
    tokenizer = WordTokenizer.from_prompts(captions)
    assert tokenizer.row_shape == (8,)
    words = [*shapes.COLOURS, *shapes.SHAPES, *shapes.SIZES]
    words += [*shapes.PLACES, *shapes.BACKGROUNDS, "a", "at", "on"]
    assert tokenizer.vocabulary == tuple(sorted(words))


def test_an_image_is_a_function_of_seed_and_index(drawn):
    captions, images = drawn
    some = np.array([7, 3, 599])
    assert shapes.captions_of(some) == [captions[index] for index in some]
    np.testing.assert_array_equal(
        shapes.images_of([captions[index] for index in some], some), images[some]
    )
    assert shapes.captions_of(np.arange(600), seed=1) != captions
    others = shapes.images_of(captions, np.arange(600), seed=1)
    assert (others != images).any((1, 2, 3)).mean() > 0.3


def test_images_are_in_range_and_anti_aliased(drawn):
    images = drawn[1]
    assert images.dtype == np.float32 and images.shape == (600, 16, 16, 3)
    assert images.min() == -1 and images.max() == 1
    # There are pixels between background and colour.
    values = [len(np.unique(image.reshape(-1, 3), axis=0)) for image in images]
    assert np.mean(np.array(values) > 2) > 0.8


def test_all_captions_are_as_likely():
    captions = shapes.captions_of(np.arange(129_600))
    _, counts = np.unique(captions, return_counts=True)
    assert len(counts) == 1296
    # A Poisson count of mean 100 has a deviation of 10.
    assert 9 < counts.std() < 11 and 95 < np.median(counts) < 105


def many(caption: str, count: int = 200) -> np.ndarray:
    return shapes.images_of([caption] * count, np.arange(count))


def coverage(images: np.ndarray) -> np.ndarray:
    """Of black backgrounds: where there is anything."""
    return (images > -0.99).any(-1)


def test_the_words_of_a_caption_are_seen():
    small, large = (
        coverage(many(f"a {size} red square on black")).sum((1, 2))
        for size in ("small", "large")
    )
    assert small.max() < large.min()
    grid = np.arange(16) - 7.5
    for place, (down, right) in shapes.PLACES.items():
        shown = coverage(many(f"a small red circle at {place} on black"))
        rows = (shown * grid[:, None]).sum((1, 2)) / shown.sum((1, 2))
        columns = (shown * grid).sum((1, 2)) / shown.sum((1, 2))
        np.testing.assert_allclose(rows, down, atol=0.01)
        np.testing.assert_allclose(columns, right, atol=0.01)
    for ground, value in (("white", 1), ("black", -1)):
        corner = many(f"a small red circle on {ground}")[:, 0, 0]
        np.testing.assert_array_equal(corner, np.full((200, 3), value))


def test_what_a_caption_leaves_open_varies():
    images = many("a red circle", 400)
    white = images[:, 0, 0, 1] > 0.9
    assert 160 < white.sum() < 240
    areas = coverage(images[~white]).sum((1, 2))
    assert areas.max() > 2 * areas.min()
    # Two backgrounds, two sizes, five places.
    assert len(np.unique(images, axis=0)) == 20


def test_a_caption_of_other_words_is_refused():
    with pytest.raises(KeyError, match="a red hexagon"):
        shapes.images_of(["a red hexagon"], np.arange(1))


def test_the_file_of_captions_is_up_to_date():
    path = ROOT / "configs" / "prompts" / "shapes.txt"
    assert path.read_text().splitlines() == shapes.captions()


# --- the judge


def test_the_judge_sees_what_the_data_set_draws(drawn):
    captions, images = drawn
    assert shapes.accuracy(images, captions) == 1.0
    found = shapes.recognise(images[:2])
    assert all(
        word in captions[index] for index in range(2) for word in found[index] if word
    )


def test_the_judge_is_not_led_by_the_caption(drawn):
    captions, images = drawn
    shuffled = shapes.accuracy(images, captions[1:] + captions[:1])
    # One of 24 by chance.
    assert 0.01 < shuffled < 0.09


@pytest.mark.parametrize(
    "harm, low, high",
    [
        ("slight noise", 0.9, 1.0),
        ("slight blur", 0.9, 1.0),
        ("heavy blur", 0.0, 0.5),
        ("a mixture of two", 0.0, 0.2),
        ("grey", 0.0, 0.0),
        ("noise alone", 0.0, 0.0),
        ("one tone", 0.0, 0.0),
    ],
)
def test_the_judge_wants_clear_images(drawn, harm, low, high):
    captions, images = drawn[0][:200], drawn[1][:200]
    noise = np.random.default_rng(0).normal(size=images.shape)
    harmed = {
        "slight noise": images + 0.05 * noise,
        "slight blur": gaussian_filter(images, (0, 0.5, 0.5, 0)),
        "heavy blur": gaussian_filter(images, (0, 1.2, 1.2, 0)),
        "a mixture of two": (images + images[::-1]) / 2,
        "grey": images.mean(-1, keepdims=True).repeat(3, -1),
        "noise alone": noise,
        "one tone": np.full_like(images, 0.3),
    }[harm]
    assert low <= shapes.accuracy(harmed, captions) <= high


def test_diversity_is_one_for_real_images_and_less_for_collapsed_ones():
    captions = [name for name in shapes.captions()[::90] for _ in range(12)]
    indices = np.arange(len(captions))
    real = shapes.images_of(captions, indices, seed=5)
    assert shapes.diversity(real, captions) == pytest.approx(1, abs=0.1)
    middles = real.reshape(-1, 12, 16, 16, 3)
    middle = middles.mean(1, keepdims=True)
    half = (middle + (middles - middle) / 2).reshape(real.shape)
    assert shapes.diversity(half, captions) == pytest.approx(
        shapes.diversity(real, captions) / 2
    )
    copies = np.repeat(middles[:, :1], 12, axis=1).reshape(real.shape)
    assert shapes.diversity(copies, captions) == 0


# --- as a data set


def test_the_data_set_gives_images_and_captions(drawn):
    dataset = load("shapes")
    assert dataset.image_shape == (16, 16, 3) and dataset.num_classes is None
    assert dataset.provenance == f"drawn shapes train, {len(dataset)} images 16x16x3"
    indices = np.array([5, 2])
    assert dataset.labels(indices) is None and dataset.captions is not None
    captions = dataset.captions(indices)
    assert captions == [drawn[0][5], drawn[0][2]]
    np.testing.assert_array_equal(dataset.images(indices), drawn[1][[5, 2]])


def test_the_test_split_is_drawn_anew():
    train, test = load("shapes"), load("shapes", split="test")
    indices = np.arange(500)
    assert 0 < len(test) < len(train)
    assert train.captions(indices) != test.captions(indices)
    assert shapes.accuracy(test.images(indices), test.captions(indices)) == 1.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "valid"}, "shapes has no split 'valid': use 'train' or 'test'"),
        ({"image_size": 32}, "shapes are RGB 16x16 images: leave out image_size"),
        ({"channels": 1}, "shapes are RGB 16x16 images: leave out image_size"),
    ],
)
def test_impossible_requests_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        load("shapes", **options)


def test_batches_bring_the_tokens_of_their_captions():
    dataset = load("shapes")
    tokenizer = WordTokenizer.from_prompts(shapes.captions())
    reader = batches(dataset, 4, seed=3, steps_per_dispatch=2, tokenizer=tokenizer)
    batch = next(reader)
    reader.close()
    assert batch["tokens"].shape == (2, 4, 8) and batch["tokens"].dtype == np.int32
    words = [
        " ".join(tokenizer.vocabulary[word - 2] for word in row if word)
        for row in batch["tokens"].reshape(8, 8)
    ]
    assert shapes.accuracy(batch["image"].reshape(8, 16, 16, 3), words) == 1.0
    without = batches(dataset, 4, seed=3)
    assert next(without).keys() == {"image"}
    without.close()
    no_captions = batches(load("digits"), 4, seed=3, tokenizer=tokenizer)
    assert "tokens" not in next(no_captions)
    no_captions.close()


# --- text-to-image, from the config, shortened


@pytest.mark.slow
@pytest.mark.long
def test_a_student_learns_from_captions_alone_what_to_paint(tmp_path):
    """All of the config's steps: a student's variety comes in the last of them."""
    config = module_of("configs").get_config()
    config.prompts.path = str(ROOT / config.prompts.path)
    one = {"devices": jax.devices()[:1], "axis_types": (AxisType.Auto,) * 3}
    mesh = jax.make_mesh((1, 1, 1), AXES, **one)
    run = Run(config, open_workdir(tmp_path / "run", config), mesh)
    pipeline.distill(run)
    scores = module_of("benchmarks").scores(run, num_seeds=100)
    captions = shapes.captions_of(np.arange(100), seed=77)
    for name, colours, both, varied in MARKS:
        found = shapes.recognise(scores[name]["images"])
        right = [
            shown.colour is not None and shown.colour in caption
            for shown, caption in zip(found, captions, strict=True)
        ]
        accuracy, diversity = scores[name]["accuracy"], scores[name]["diversity"]
        print(f"{name}: {np.mean(right):.2f}, {accuracy:.2f}, {diversity:.2f}")
        assert np.mean(right) > colours, name
        assert accuracy > both, name
        assert diversity > varied, name
