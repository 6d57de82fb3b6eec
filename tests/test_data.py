import pathlib
import struct
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from boot_jax.data import DataError, load


def noise(seed, height, width, channels=3):
    """Random uint8 pixels: an image that no two others share."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: pathlib.Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze()).save(path)


# --- digits


def test_digits_are_those_of_scikit_learn_in_minus_one_to_one():
    digits = load("digits")
    values, classes = load_digits(return_X_y=True)
    indices = np.array([3, 1796, 0, 3])
    images = digits.images(indices)
    assert images.dtype == np.float32
    assert images.shape == (4, *digits.image_shape) == (4, 8, 8, 1)
    expected = np.asarray(values)[indices] * 2 / 16 - 1
    np.testing.assert_array_equal(images.reshape(4, 64), expected)
    labels = digits.labels(indices)
    assert labels is not None and labels.dtype == np.int32
    np.testing.assert_array_equal(labels, np.asarray(classes)[indices])
    everything = digits.images(np.arange(len(digits)))
    assert (everything.min(), everything.max()) == (-1, 1)
    assert (len(digits), digits.num_classes) == (1797, 10)
    assert digits.provenance == "scikit-learn digits, 1797 images 8x8x1"


# --- folders


@pytest.fixture
def classes_folder(tmp_path):
    root = tmp_path / "animals"
    for index, name in enumerate(["cat/b.PNG", "cat/a.png", "ant/z.bmp", "dog/q.png"]):
        save(root / name, noise(index, 4, 6))
    (root / "empty").mkdir()
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "cat" / "._a.png").write_bytes(b"what macOS leaves behind")
    return root


@pytest.mark.parametrize("cache_bytes", [2**30, 2 * 4 * 6 * 3, 0])
def test_folder_reads_classes_in_order_of_names(classes_folder, cache_bytes):
    animals = load("folder", path=str(classes_folder), cache_bytes=cache_bytes)
    assert (len(animals), animals.image_shape) == (4, (4, 6, 3))
    assert animals.num_classes == 3
    assert animals.provenance == "image folder animals, 4 images 4x6x3"
    # ant/z, cat/a, cat/b, dog/q were written with these seeds.
    expected = np.stack([noise(seed, 4, 6) for seed in (2, 1, 0, 3)])
    for _ in range(2):  # The second time, what fits comes out of memory.
        indices = np.array([2, 0, 2, 3, 1])
        images = animals.images(indices)
        assert images.dtype == np.float32
        np.testing.assert_allclose(
            images, expected[indices].astype(np.float64) / 255 * 2 - 1, atol=1e-6
        )
        labels = animals.labels(indices)
        assert labels is not None and labels.dtype == np.int32
        np.testing.assert_array_equal(labels, [1, 0, 1, 2, 1])


def test_labels_can_be_read_without_images(classes_folder):
    animals = load("folder", path=str(classes_folder))
    np.testing.assert_array_equal(animals.labels(np.array([3, 0, 3])), [2, 0, 2])


def test_pixels_reach_both_ends_exactly(tmp_path):
    save(tmp_path / "ends.png", np.array([[0, 255], [255, 0]], np.uint8))
    image = load("folder", path=str(tmp_path), channels=1).images(np.array([0]))[0]
    np.testing.assert_array_equal(image[..., 0], [[-1, 1], [1, -1]])


def test_flat_folder_has_no_labels(tmp_path):
    for index in range(3):
        save(tmp_path / f"{index}.png", noise(index, 5, 5))
    flat = load("folder", path=str(tmp_path))
    assert flat.num_classes is None
    assert flat.labels(np.array([0, 1])) is None


def test_memory_is_used_only_as_allowed(tmp_path):
    save(tmp_path / "a.png", noise(0, 4, 4))
    for cache_bytes, still_there in ((4 * 4 * 3, True), (4 * 4 * 3 - 1, False)):
        save(tmp_path / "a.png", noise(0, 4, 4))
        dataset = load("folder", path=str(tmp_path), cache_bytes=cache_bytes)
        before = dataset.images(np.array([0]))
        save(tmp_path / "a.png", noise(1, 4, 4))
        after = dataset.images(np.array([0]))
        assert np.array_equal(before, after) == still_there


@pytest.mark.parametrize("height, width", [(4, 7), (8, 4), (5, 5)])
def test_crop_takes_the_centre_without_touching_pixels(tmp_path, height, width):
    pixels = noise(0, height, width)
    save(tmp_path / "a.png", pixels)
    side = min(height, width)
    dataset = load("folder", path=str(tmp_path), image_size=side)
    top, left = (height - side) // 2, (width - side) // 2
    cropped = pixels[top : top + side, left : left + side]
    image = dataset.images(np.array([0]))[0]
    np.testing.assert_array_equal(np.rint((image + 1) * 127.5), cropped)
    assert dataset.provenance.endswith(f"{side}x{side}x3 (centre squares, Lanczos)")


def lanczos_matrix(size_in, size_out):
    """Rows of normalised Lanczos-3 weights, stretched by the scale: antialiased."""
    scale = size_in / size_out
    centres = (np.arange(size_out) + 0.5) * scale
    distance = (np.arange(size_in) + 0.5 - centres[:, None]) / scale
    weights = np.sinc(distance) * np.sinc(distance / 3) * (np.abs(distance) < 3)
    return weights / weights.sum(1, keepdims=True)


def test_resizing_is_an_antialiased_lanczos_filter(tmp_path):
    pixels = noise(0, 24, 30)
    save(tmp_path / "a.png", pixels)
    image = load("folder", path=str(tmp_path), image_size=8).images(np.array([0]))[0]
    matrix = lanczos_matrix(24, 8)
    square = pixels[:, 3:27].astype(np.float64)
    expected = np.einsum("ij,jkc,lk->ilc", matrix, square, matrix).clip(0, 255)
    # Pillow rounds to 8 bits after each of the two directions.
    np.testing.assert_allclose((image + 1) * 127.5, expected, atol=1.5)


def test_channels_turn_colour_grey_and_grey_to_colour(tmp_path):
    colour, grey = noise(0, 3, 3), noise(1, 3, 3, 1)
    save(tmp_path / "colour.png", colour)
    save(tmp_path / "grey.png", grey)
    both = np.array([0, 1])
    as_grey = load("folder", path=str(tmp_path), channels=1).images(both)
    assert as_grey.shape == (2, 3, 3, 1)
    luma = colour @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose((as_grey[0, ..., 0] + 1) * 127.5, luma, atol=1)
    as_colour = load("folder", path=str(tmp_path)).images(both)
    np.testing.assert_allclose(
        (as_colour[1] + 1) * 127.5, grey.repeat(3, -1), atol=1e-4
    )


def test_decoding_threads_end_with_the_data_set(classes_folder):
    before = set(threading.enumerate())
    dataset = load("folder", path=str(classes_folder))
    dataset.images(np.arange(4))
    started = set(threading.enumerate()) - before
    assert started
    del dataset
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


# --- what a user can do wrong


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"name": "mnist"},
            "no data set 'mnist': use 'digits', 'shapes', 'folder' or 'tfds:NAME'",
        ),
        (
            {"name": "digits", "split": "test"},
            "digits has no split 'test': use 'train'",
        ),
        ({"name": "digits", "image_size": 16}, "digits are grey 8x8 images: leave out"),
        ({"name": "digits", "channels": 3}, "digits are grey 8x8 images: leave out"),
        ({"name": "digits", "channels": 2}, r"must be 1 \(grey\) or 3 \(RGB\), not 2"),
        ({"name": "folder", "image_size": 0}, "must be at least 1 pixel, not 0"),
        ({"name": "folder"}, "no folder '': set path to the folder of the images"),
        ({"name": "folder", "path": "nowhere"}, "no folder 'nowhere': set path to"),
        (
            {"name": "folder", "split": "test"},
            "folder has no split 'test': use 'train'",
        ),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        load(**arguments)


def test_folder_without_images(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "text.txt").write_text("no image")
    with pytest.raises(
        DataError, match=r"has images \(\.png, .*neither in it nor below"
    ):
        load("folder", path=str(tmp_path))


def test_images_beside_class_folders(classes_folder):
    save(classes_folder / "stray.png", noise(0, 4, 6))
    with pytest.raises(DataError, match="in and outside class folders: put all into"):
        load("folder", path=str(classes_folder))


def test_images_of_different_sizes(tmp_path):
    save(tmp_path / "a.png", noise(0, 4, 6))
    save(tmp_path / "b.png", noise(0, 5, 6))
    dataset = load("folder", path=str(tmp_path))
    message = r"b\.png is 5x6 pixels but the first image 4x6: set image_size"
    with pytest.raises(DataError, match=message):
        dataset.images(np.array([0, 1]))
    assert load("folder", path=str(tmp_path), image_size=4).image_shape == (4, 4, 3)


def test_image_smaller_than_image_size(tmp_path):
    save(tmp_path / "small.png", noise(0, 9, 4))
    with pytest.raises(
        DataError, match=r"small\.png is 9x4 pixels, smaller than image_s"
    ):
        load("folder", path=str(tmp_path), image_size=5)


@pytest.mark.parametrize("kind", ["text", "cut", "sixteen"])
def test_unreadable_files_are_named(tmp_path, kind):
    save(tmp_path / "a.png", noise(0, 8, 8))
    bad = tmp_path / "bad.png"
    if kind == "text":
        bad.write_text("this is no image")
    elif kind == "cut":
        bad.write_bytes((tmp_path / "a.png").read_bytes()[:120])
    else:
        Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(bad)
    dataset = load("folder", path=str(tmp_path))
    with pytest.raises(DataError, match=r"cannot read .*bad\.png: repair or remove it"):
        dataset.images(np.array([0, 1]))


def png_of_16_bits(path: pathlib.Path, colour_type: int, channels: int) -> None:
    """A PNG that pillow can read, but not write: 16 bits in each of its channels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", 8, 8, 16, colour_type, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(range(16)) * channels) * 8)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_refused_in_every_kind_of_png(tmp_path, colour_type, channels):
    """Pillow would cut colour to 8 bits without a word."""
    png_of_16_bits(tmp_path / "deep.png", colour_type, channels)
    with pytest.raises(DataError, match=r"deep\.png: .* more than 8 bits a channel"):
        load("folder", path=str(tmp_path))


def test_grey_palette_cmyk_and_transparent_files_become_rgb(tmp_path):
    """As documented: by pillow's own conversion, transparency left out."""
    flat = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    clear = np.concatenate([flat, np.zeros((8, 8, 1), np.uint8)], -1)
    files = {
        "a_grey.png": Image.fromarray(flat).convert("L"),
        "b_palette.png": Image.fromarray(flat).convert("P", palette=1),
        "c_cmyk.jpg": Image.fromarray(flat).convert("CMYK"),
        "d_clear.png": Image.fromarray(clear),
        "e_one_bit.png": Image.fromarray(flat).convert("1", dither=0),
    }
    for name, image in files.items():
        image.save(tmp_path / name)
    dataset = load("folder", path=str(tmp_path))
    found = (dataset.images(np.arange(5)) + 1) * 127.5
    assert found.shape == (5, 8, 8, 3)
    luma = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    wanted = [(luma,) * 3, (200, 100, 50), (200, 100, 50), (200, 100, 50), None]
    for image, colour in zip(found, wanted, strict=True):
        if colour is not None:
            np.testing.assert_allclose(
                image, np.broadcast_to(colour, (8, 8, 3)), atol=6
            )
    assert set(np.unique(np.rint(found[4]))) <= {0, 255}


# --- tensorflow-datasets, prepared here without network and without tensorflow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data directory with ``pictures``: seven PNGs of 5x6 in three classes."""
    tfds = pytest.importorskip("tensorflow_datasets")
    root = tmp_path_factory.mktemp("tfds")
    for index in range(7):
        save(root / "png" / f"{index}.png", noise(index, 5, 6))

    class Pictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(num_classes=3),
                    "number": np.int64,
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for index in range(7):
                path = root / "png" / f"{index}.png"
                # A file's bytes are stored as they are: tensorflow encodes arrays only.
                yield index, {"image": path, "label": index % 3, "number": index}

    builder = Pictures(data_dir=root / "data", file_format="array_record")
    builder.download_and_prepare()
    return root / "data"


def test_tfds_gives_its_images_and_labels(prepared):
    pictures = load("tfds:pictures", path=str(prepared))
    assert pictures.image_shape == (5, 6, 3)
    assert (len(pictures), pictures.num_classes) == (7, 3)
    assert pictures.provenance == "pictures/1.0.0 train, 7 images 5x6x3"
    images = pictures.images(np.arange(7))
    assert images.dtype == np.float32
    found = np.rint((images + 1) * 127.5).astype(np.uint8)
    # The data set is shuffled when it is prepared: look each image up.
    written = [noise(index, 5, 6) for index in range(7)]
    order = [
        next(index for index, pixels in enumerate(written) if (pixels == image).all())
        for image in found
    ]
    assert sorted(order) == list(range(7))
    labels = pictures.labels(np.arange(7))
    assert labels is not None and labels.dtype == np.int32
    np.testing.assert_array_equal(labels, np.array(order) % 3)
    fresh = load("tfds:pictures:1.0.0", path=str(prepared))
    np.testing.assert_array_equal(fresh.labels(np.arange(7)), labels)
    assert "tensorflow" not in sys.modules


def test_tfds_reads_a_record_once_for_image_and_label(prepared, monkeypatch):
    from tensorflow_datasets.core.data_sources.base import BaseDataSource

    reads = []
    pictures = load("tfds:pictures", path=str(prepared))
    read = BaseDataSource.__getitem__
    monkeypatch.setattr(
        BaseDataSource,
        "__getitem__",
        lambda self, i: [reads.append(i), read(self, i)][1],
    )
    for _ in range(2):
        pictures.images(np.arange(5))
        pictures.labels(np.arange(7))
    assert sorted(reads) == list(range(7))


def test_tfds_takes_slices_sizes_and_channels(prepared):
    some = load(
        "tfds:pictures", path=str(prepared), split="train[:3]", image_size=4, channels=1
    )
    everything = load("tfds:pictures", path=str(prepared), image_size=4, channels=1)
    assert some.image_shape == (4, 4, 1)
    assert len(some) == 3
    np.testing.assert_array_equal(
        some.images(np.arange(3)), everything.images(np.arange(3))
    )


def test_tfds_without_the_data(prepared, tmp_path):
    message = (
        r"tfds:mnist is not in .*: prepare it, .* tensorflow_datasets\.builder\("
        r"'mnist', data_dir='.*', file_format='array_record'\)\.download_and_prepare"
    )
    with pytest.raises(DataError, match=message):
        load("tfds:mnist", path=str(tmp_path))
    with pytest.raises(DataError, match="tfds:No Such-Name is not in"):
        load("tfds:No Such-Name", path=str(prepared))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["test", "train[", "train[:0]"])
def test_tfds_without_the_split(prepared, split):
    with pytest.raises(
        DataError, match=r"no images in split .*: its splits are \['train'"
    ):
        load("tfds:pictures", path=str(prepared), split=split)


def copy_with(prepared, target, replaced, replacement):
    """The prepared data set with other words in its two descriptions."""
    folder = target / "pictures" / "1.0.0"
    folder.mkdir(parents=True)
    for file in (prepared / "pictures" / "1.0.0").iterdir():
        content = file.read_bytes()
        if file.suffix == ".json":
            content = content.replace(replaced, replacement)
        (folder / file.name).write_bytes(content)
    return str(target)


def test_tfds_in_a_format_without_random_access(prepared, tmp_path):
    path = copy_with(prepared, tmp_path, b"array_record", b"tfrecord")
    message = "is stored as tfrecord, not as array_record: delete .*array_record"
    with pytest.raises(DataError, match=message):
        load("tfds:pictures", path=path)


def test_tfds_without_an_image(prepared, tmp_path):
    path = copy_with(
        prepared, tmp_path, b'"image": {\n                "im', b'"x": {"im'
    )
    with pytest.raises(DataError, match=r"no images named 'image', only \['label'"):
        load("tfds:pictures", path=path)


def test_tfds_with_a_file_missing(prepared, tmp_path):
    path = copy_with(prepared, tmp_path, b"", b"")
    next(tmp_path.glob("*/*/*.array_record-*")).unlink()
    with pytest.raises(DataError, match="tfds:pictures is damaged: delete it and prep"):
        load("tfds:pictures", path=path)


def test_tfds_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"pip install 'boot_jax\[tfds\]'"):
        load("tfds:pictures")
