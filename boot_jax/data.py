"""Real images, for training a teacher and for scoring; distillation reads none.

`load` opens a source as a `Dataset`: images by index, float32 in [-1, 1], NHWC.
`boot_jax.batches` reads it ahead of the training loop.
"""

import concurrent.futures
import dataclasses
import functools
import io
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from boot_jax import shapes

#: File names that count as images in a folder, in either case.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

#: Threads that decode the images of one data set; pillow works outside Python's lock.
DECODING_THREADS = 8

#: Seed and number of the drawn images of each split.
_SHAPES_SPLITS = {"train": (0, 200_000), "test": (1, 10_000)}

_NOT_READ = np.iinfo(np.int32).min

# What pillow opens, what an error message calls it, and its class (0 without labels).
_Record = tuple[str | io.BytesIO, str, int]


class DataError(ValueError):
    """The images asked for cannot be had; the message says what to do about it."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """Images in random access; build one to bring images of your own.

    Attributes:
      name: what `load` was asked for.
      provenance: source, number and size of the images in one phrase, for reports.
      num_examples: the number of images, at least 1; also the data set's ``len``.
      image_shape: ``(H, W, C)`` in pixels and channels.
      num_classes: the number of classes; None without labels.
      images: maps indices ``[n]`` to images ``[n, H, W, C]``, float32 in [-1, 1].
      labels: maps indices ``[n]`` to classes ``[n]``, int32; to None without labels.
      captions: maps indices ``[n]`` to ``n`` texts; None without captions.
    """

    name: str
    provenance: str
    num_examples: int
    image_shape: tuple[int, int, int]
    num_classes: int | None
    images: Callable[[np.ndarray], np.ndarray]
    labels: Callable[[np.ndarray], np.ndarray | None]
    captions: Callable[[np.ndarray], list[str]] | None = None

    def __len__(self) -> int:
        return self.num_examples


class _Options(NamedTuple):
    image_size: int | None
    channels: int | None
    cache_bytes: int


def load(
    name: str,
    *,
    path: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    split: str = "train",
    cache_bytes: int = 2**30,
) -> Dataset:
    """Opens a data set; nothing is ever downloaded.

    Args:
      name: ``"digits"``, scikit-learn's 1797 handwritten digits, 8x8x1 in 10 classes;
        ``"shapes"``, drawn coloured shapes with captions, 16x16x3 (`boot_jax.shapes`);
        ``"folder"``, the images in ``path/CLASS/`` (the subfolders that hold images, in
        order of their names, are classes 0, 1, ...) or in ``path`` itself (no labels);
        ``"tfds:NAME"``, a data set with a feature "image" and perhaps a class "label"
        that tensorflow-datasets has prepared in the array_record format; NAME may add
        configuration and version: ``"tfds:NAME/CONFIG:1.0.0"``.
      path: the folder, or the data directory of tensorflow-datasets (None: its own).
      image_size: side in pixels; the largest centred square of each image is scaled
        down to it with a Lanczos filter. None keeps images, which must share one size.
      channels: 1 (grey) or 3 (RGB); None is 3 for a folder, else the source's own.
        Grey, palette and CMYK files are converted as Pillow does it, without colour
        profiles; transparency and orientation tags are not applied; files of more than
        8 bits a channel are refused.
      split: a split of tensorflow-datasets or a slice of it, such as ``"train[:90%]"``;
        ``"train"`` or ``"test"`` of shapes, drawn from two seeds; the other sources
        have ``"train"`` alone, with all their images.
      cache_bytes: decoded images, a byte for each channel of a pixel, stay in memory up
        to this many bytes, those used last; 0 keeps none.

    Raises:
      DataError: the data set cannot be opened or its first image not read. Damaged, too
        small or differing images further on raise it when they are read.
    """
    if channels not in (None, 1, 3):
        raise DataError(f"channels must be 1 (grey) or 3 (RGB), not {channels}")
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size must be at least 1 pixel, not {image_size}")
    if name in ("digits", "folder") and split != "train":
        raise DataError(f"{name} has no split {split!r}: use 'train', all the images")
    options = _Options(image_size, channels, cache_bytes)
    if name == "digits":
        return _digits(options)
    if name == "shapes":
        return _shapes(split, options)
    if name == "folder":
        return _folder(path, options)
    if name.startswith("tfds:"):
        return _tfds(name, path, split, options)
    raise DataError(
        f"no data set {name!r}: use 'digits', 'shapes', 'folder' or 'tfds:NAME'"
    )


def _decoded(
    name: str,
    origin: str,
    record: Callable[[int], _Record],
    num_examples: int,
    num_classes: int | None,
    options: _Options,
) -> Dataset:
    shape = _decode(*record(0)[:2], options).shape
    classes = np.full(num_examples, _NOT_READ, np.int32)
    threads = concurrent.futures.ThreadPoolExecutor(DECODING_THREADS, "boot_jax-decode")

    @functools.lru_cache(maxsize=options.cache_bytes // math.prod(shape))
    def image(index: int) -> np.ndarray:
        file, place, classes[index] = record(index)
        pixels = _decode(file, place, options)
        if pixels.shape != shape:
            raise DataError(
                f"{place} is {pixels.shape[0]}x{pixels.shape[1]} pixels but the first "
                f"image {shape[0]}x{shape[1]}: set image_size to bring all to one size"
            )
        return pixels

    def images(indices: np.ndarray) -> np.ndarray:
        pixels = np.stack(list(threads.map(image, indices.tolist())))
        return np.divide(pixels, 127.5, dtype=np.float32) - np.float32(1)

    def labels(indices: np.ndarray) -> np.ndarray:
        # Reading an image has noted its class: no record is read a second time for it.
        for index in np.unique(indices[classes[indices] == _NOT_READ]).tolist():
            classes[index] = record(index)[-1]
        return classes[indices]

    size = "x".join(map(str, shape))
    resized = " (centre squares, Lanczos)" if options.image_size else ""
    return Dataset(
        name=name,
        provenance=f"{origin}, {num_examples} images {size}{resized}",
        num_examples=num_examples,
        image_shape=shape,
        num_classes=num_classes,
        images=images,
        labels=labels if num_classes else lambda indices: None,
    )


def _decode(file: str | io.BytesIO, place: str, options: _Options) -> np.ndarray:
    # Turning by EXIF orientation is left out, as in the usual reference statistics.
    try:
        with Image.open(file) as opened:
            # Pillow opens 16-bit colour as if it had 8, and says so here alone.
            raw = [str(tile[3]) for tile in getattr(opened, "tile", ())]
            if opened.mode.startswith(("I", "F")) or any(";16B" in r for r in raw):
                raise ValueError("it has more than 8 bits a channel")
            image = opened.convert("L" if options.channels == 1 else "RGB")
    # Pillow raises all of these for damaged files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"cannot read {place}: repair or remove it ({error})"
        ) from error
    if size := options.image_size:
        if min(image.size) < size:
            raise DataError(
                f"{place} is {image.height}x{image.width} pixels, smaller than "
                f"image_size {size}: remove it or set a smaller image_size"
            )
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(image.height, image.width, -1)


def _digits(options: _Options) -> Dataset:
    from sklearn.datasets import load_digits

    if options.image_size not in (None, 8) or options.channels not in (None, 1):
        raise DataError("digits are grey 8x8 images: leave out image_size and channels")
    values, classes = load_digits(return_X_y=True)
    images = (np.asarray(values, np.float32) / 8 - 1).reshape(-1, 8, 8, 1)
    return Dataset(
        name="digits",
        provenance=f"scikit-learn digits, {len(images)} images 8x8x1",
        num_examples=len(images),
        image_shape=(8, 8, 1),
        num_classes=10,
        images=images.__getitem__,
        labels=np.asarray(classes, np.int32).__getitem__,
    )


def _shapes(split: str, options: _Options) -> Dataset:
    if split not in _SHAPES_SPLITS:
        raise DataError(f"shapes has no split {split!r}: use 'train' or 'test'")
    side = shapes.SIDE
    if options.image_size not in (None, side) or options.channels not in (None, 3):
        raise DataError(
            f"shapes are RGB {side}x{side} images: leave out image_size and channels"
        )
    seed, num_examples = _SHAPES_SPLITS[split]
    captions = functools.partial(shapes.captions_of, seed=seed)
    return Dataset(
        name="shapes",
        provenance=f"drawn shapes {split}, {num_examples} images {side}x{side}x3",
        num_examples=num_examples,
        image_shape=(side, side, 3),
        num_classes=None,
        images=lambda indices: shapes.images_of(captions(indices), indices, seed),
        labels=lambda indices: None,
        captions=captions,
    )


def _folder(path: str | None, options: _Options) -> Dataset:
    root = os.path.expanduser(path or "")
    if not os.path.isdir(root):
        raise DataError(f"no folder {root!r}: set path to the folder of the images")
    folders = sorted(entry.path for entry in os.scandir(root) if entry.is_dir())
    flat = _image_paths(root)
    classes = [paths for folder in folders if (paths := _image_paths(folder))]
    if bool(flat) == bool(classes):
        found = "in and outside class folders" if flat else "neither in it nor below"
        raise DataError(
            f"{root!r} has images ({', '.join(IMAGE_SUFFIXES)}) {found}: put all into "
            "the folder itself, or all into subfolders, one a class"
        )
    records = [
        (file, file, label)
        for label, files in enumerate(classes or [flat])
        for file in files
    ]
    origin = f"image folder {os.path.basename(os.path.abspath(root))}"
    options = options._replace(channels=options.channels or 3)
    get, num_classes = records.__getitem__, len(classes) or None
    return _decoded("folder", origin, get, len(records), num_classes, options)


def _image_paths(folder: str) -> list[str]:
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    return [os.path.join(folder, name) for name in images]


def _tfds(name: str, path: str | None, split: str, options: _Options) -> Dataset:
    try:
        import array_record.python.array_record_data_source  # noqa: F401
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.read_only_builder import builder_from_files
    except ImportError as error:
        raise DataError(
            f"{name} needs more packages: pip install 'boot_jax[tfds]' ({error})"
        ) from error
    name_there, data_dir = name.removeprefix("tfds:"), path and os.path.expanduser(path)
    prepare = (
        "prepare it, where tensorflow is installed, with tensorflow_datasets.builder("
        f"{name_there!r}, data_dir={data_dir!r}, file_format='array_record')"
        ".download_and_prepare()"
    )
    try:
        # Unlike tfds.builder, it opens what is on the disk without the data set's own
        # builder, which may need tensorflow, or be of another version.
        builder: Any = builder_from_files(name_there, data_dir=data_dir)
    except ValueError as error:
        where = data_dir or "the data directory of tensorflow-datasets"
        raise DataError(f"{name} is not in {where}: {prepare}") from error
    features = dict(builder.info.features.items())
    if not isinstance(features.get("image"), tfds.features.Image):
        raise DataError(f"{name} has no images named 'image', only {sorted(features)}")
    source = _tfds_source(builder, name, split, prepare)
    num_classes = getattr(features.get("label"), "num_classes", None)
    options = options._replace(channels=options.channels or features["image"].shape[-1])

    def record(index: int) -> _Record:
        try:
            example = source[index]
        except (RuntimeError, ValueError) as error:  # What array_record raises.
            message = f"{name} is damaged: delete it and {prepare} ({error})"
            raise DataError(message) from error
        label = example["label"] if num_classes else 0
        return io.BytesIO(example["image"]), f"image {index} of {name}", label

    origin = f"{builder.info.full_name} {split}"
    return _decoded(name, origin, record, len(source), num_classes, options)


def _tfds_source(builder: Any, name: str, split: str, prepare: str) -> Sequence[Any]:
    import tensorflow_datasets as tfds

    try:
        # The bytes of the image go to pillow, as those of a folder's files do.
        skip = {"image": tfds.decode.SkipDecoding()}
        return builder.as_data_source(split, decoders=skip)
    except NotImplementedError as error:
        raise DataError(
            f"{name} is stored as {builder.info.file_format.value}, not as "
            f"array_record: delete {builder.info.data_dir} and {prepare}"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{name} has no images in split {split!r}: its splits are "
            f"{sorted(builder.info.splits)}, with slices such as 'train[:90%]'"
        ) from error
