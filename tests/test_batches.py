import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from boot_jax import batches as batching
from boot_jax.batches import batch_indices, batches
from boot_jax.data import DataError, Dataset, load


def save(path, seed):
    """A 4x4 image of random pixels."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def numbered(num_examples, labels=True) -> Dataset:
    """Images of 2x3 that say their index: the value is it, and the columns differ."""
    columns = np.array([0.0, 0.25, 0.5], np.float32)
    pixels = np.arange(num_examples, dtype=np.float32)[:, None, None, None] + np.zeros(
        (1, 2, 1, 1), np.float32
    )
    return Dataset(
        name="numbered",
        provenance="made up",
        num_examples=num_examples,
        image_shape=(2, 3, 1),
        num_classes=num_examples if labels else None,
        images=lambda indices: pixels[indices] + columns[:, None],
        labels=lambda indices: indices.astype(np.int32) if labels else None,
    )


def take(count, *args, **kwargs):
    iterator = batches(*args, **kwargs)
    items = [next(iterator) for _ in range(count)]
    iterator.close()
    return items


def data_threads():
    return [t for t in threading.enumerate() if t.name.startswith("boot_jax-batches")]


@pytest.mark.parametrize("batch_size", [1, 3, 10, 23])
def test_each_epoch_visits_each_example_once(batch_size):
    num_examples, epochs = 10, 23
    steps = num_examples * epochs // batch_size
    order = np.concatenate([batch_indices(10, batch_size, 5, i) for i in range(steps)])
    assert order.dtype == np.int64
    visits = order[: len(order) // 10 * 10].reshape(-1, 10)
    np.testing.assert_array_equal(
        np.sort(visits), np.tile(np.arange(10), (len(visits), 1))
    )
    assert len({tuple(visit) for visit in visits}) > len(visits) - 2


def test_order_does_not_depend_on_batch_size_or_calls_before():
    one_by_one = [int(batch_indices(7, 1, 3, step)[0]) for step in range(60)]
    for batch_size in (2, 7, 20):
        batching._permutation.cache_clear()
        for step in reversed(range(60 // batch_size)):
            expected = one_by_one[step * batch_size : (step + 1) * batch_size]
            np.testing.assert_array_equal(
                batch_indices(7, batch_size, 3, step), expected
            )


def test_order_is_kept_for_good():
    # Numpy promises these words of Philox. A change here breaks every resume.
    seeds = np.random.SeedSequence(11, spawn_key=(0, 2))
    words = np.random.Philox(seeds).random_raw(5)
    np.testing.assert_array_equal(batch_indices(5, 5, 11, 2), np.argsort(words))
    np.testing.assert_array_equal(batch_indices(5, 5, 11, 2), [4, 0, 2, 3, 1])


def test_orders_are_uniform_over_permutations():
    from scipy.stats import chisquare

    orders = [tuple(batch_indices(3, 3, 1, step)) for step in range(1200)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert chisquare(counts).pvalue > 1e-3
    other_seed = [tuple(batch_indices(3, 3, 2, step)) for step in range(1200)]
    agreement = np.mean([a == b for a, b in zip(orders, other_seed, strict=True)])
    assert abs(agreement - 1 / 6) < 0.05


def test_permutations_are_not_made_anew_in_each_step():
    num_examples = 200_000
    batch_indices(num_examples, 8, 0, 0)
    before = batching._permutation.cache_info().misses
    for step in range(500):
        batch_indices(num_examples, 8, 0, step)
    assert batching._permutation.cache_info().misses == before


def test_a_permutation_takes_four_bytes_an_example():
    assert batching._permutation(1000, 0, 0).nbytes == 4000


@pytest.mark.parametrize(
    "wrong", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)]
)
def test_impossible_batches_are_refused(wrong):
    with pytest.raises(DataError, match="must be at least 1, seed and step at least 0"):
        batch_indices(*wrong)


def test_batches_refuses_before_the_first_item():
    with pytest.raises(DataError, match="must be at least 1, seed and step"):
        batches(numbered(3), 0, 0)
    with pytest.raises(DataError, match="steps_per_dispatch must be at least 1: 0"):
        batches(numbered(3), 1, 0, 0, 0)


def test_items_hold_the_batches_of_their_steps():
    items = take(3, numbered(10), 4, 7, start_step=2, steps_per_dispatch=3)
    for item, first in zip(items, (2, 5, 8), strict=True):
        assert item["image"].shape == (3, 4, 2, 3, 1)
        assert item["image"].dtype == np.float32
        assert item["label"].dtype == np.int32
        expected = [batch_indices(10, 4, 7, step) for step in range(first, first + 3)]
        np.testing.assert_array_equal(item["label"], expected)
        np.testing.assert_array_equal(item["image"][..., 0, 0, 0], expected)


def test_items_of_a_data_set_without_labels_have_none():
    assert set(take(1, numbered(4, labels=False), 2, 0)[0]) == {"image"}


@pytest.mark.parametrize("random_flip", [False, True])
def test_resuming_and_dispatching_change_nothing(random_flip):
    dataset = numbered(10)
    through = take(12, dataset, 4, 7, random_flip=random_flip)
    images = np.concatenate([item["image"] for item in through])
    for start, steps in ((0, 4), (4, 2), (5, 3), (11, 1)):
        item = take(1, dataset, 4, 7, start, steps, random_flip=random_flip)[0]
        np.testing.assert_array_equal(item["image"], images[start : start + steps])


def test_processes_read_parts_of_the_same_batch():
    whole = take(2, numbered(10), 6, 1, steps_per_dispatch=2, random_flip=True)
    parts = [
        take(2, numbered(10), 6, 1, 0, 2, random_flip=True, rows=slice(i, i + 3))
        for i in (0, 3)
    ]
    for number, item in enumerate(whole):
        for key in ("image", "label"):
            joined = np.concatenate([part[number][key] for part in parts], axis=1)
            np.testing.assert_array_equal(joined, item[key])


def test_flips_mirror_half_of_the_images_left_to_right():
    dataset = numbered(400)
    plain = take(1, dataset, 400, 3, 0, 5)[0]["image"]
    flipped = take(1, dataset, 400, 3, 0, 5, random_flip=True)[0]["image"]
    turned = (plain != flipped).any(axis=(2, 3, 4))
    mirrored = np.where(turned[..., None, None, None], plain[..., ::-1, :], plain)
    np.testing.assert_array_equal(flipped, mirrored)
    assert abs(turned.mean() - 0.5) < 0.05  # Deviation 0.011 for 2000 coins.
    # The coins have a stream of their own, apart from that of the order.
    seeds = [np.random.SeedSequence(3, spawn_key=(1, step)) for step in range(5)]
    words = np.stack([np.random.Philox(seed).random_raw(400) for seed in seeds])
    np.testing.assert_array_equal(turned, words < 2**63)
    assert len({tuple(row) for row in turned}) == 5


# --- the thread


def test_next_item_is_read_while_the_consumer_works():
    read = threading.Event()
    dataset = numbered(4)

    def images(indices):
        if reads:
            read.set()
        reads.append(indices)
        return dataset.images(indices)

    reads = []
    iterator = batches(Dataset(**{**vars(dataset), "images": images}), 2, 0)
    next(iterator)
    assert read.wait(timeout=10)
    time.sleep(0.05)
    assert len(reads) == 2  # One ahead, and no more.
    iterator.close()


def test_thread_ends_with_the_iteration():
    assert not data_threads()
    iterator = batches(numbered(4), 2, 0)
    assert not data_threads()
    next(iterator)
    assert len(data_threads()) == 1
    iterator.close()
    assert not data_threads()
    for _ in batches(numbered(4), 2, 0):
        break
    del _
    assert not data_threads()


def test_errors_reach_the_consumer(tmp_path):
    save(tmp_path / "a.png", 0)
    (tmp_path / "b.png").write_text("broken")
    dataset = load("folder", path=str(tmp_path))
    iterator = batches(dataset, 1, 0)
    with pytest.raises(DataError, match=r"cannot read .*b\.png"):
        for _ in range(3):
            next(iterator)
    assert not data_threads()


def test_an_open_iterator_does_not_keep_the_interpreter(tmp_path):
    for index in range(4):
        save(tmp_path / f"{index}.png", index)
    program = (
        "from boot_jax.batches import batches\n"
        "from boot_jax.data import load\n"
        f"items = batches(load('folder', path={str(tmp_path)!r}), 2, 0)\n"
        "print(next(items)['image'].shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "(1, 2, 4, 4, 3)\n"), done.stderr
    assert not done.stderr
