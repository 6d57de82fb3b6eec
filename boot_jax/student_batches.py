"""What a student is shown: nothing, prompts, real images, or stored samples.

It is a function of seed and step, so that a run goes on exactly.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from boot_jax import data as data_lib
from boot_jax import stored
from boot_jax.batches import batches
from boot_jax.conditions import TOKENS
from boot_jax.config import ConfigError
from boot_jax.guidance import SCALE_KEY
from boot_jax.teachers.mixture import sample_mixture
from boot_jax.tokenizers import Tokenizer
from boot_jax.training.distillation import IMAGE, INDEX, TARGET

if TYPE_CHECKING:
    from boot_jax.run import Run

#: ``(start_step, steps_per_dispatch)`` to batches ``[k, B, ...]`` on the mesh.
Batches = Callable[[int, int], Iterator[Any]]

# Of the exact samples of a mixture.
_MIXTURE_STREAM = 2**31 + 2


def batches_of(run: "Run") -> Batches | None:
    """What a run's student is shown; None for nothing.

    A stored set is made here, if it is not there.

    Raises:
      ConfigError: real images are needed, and cannot be had of this teacher's kind.
      WorkdirError: the stored set is another one.
    """
    if run.objective.needs_images:
        return _images(run)
    if run.objective.reads_stored:
        return functools.partial(stored.stored_batches, run, stored.open_stored(run))
    return None if run.prompts is None else run.prompt_batches


def batch_shapes(run: "Run") -> Any:
    """The shapes of one step's batch ``[B, ...]``; None for no batch."""
    batch_size, teacher = run.config.distill.batch_size, run.teacher
    names: dict[str, tuple[tuple[int, ...], str]] = {}
    if run.objective.needs_images:
        names[IMAGE] = teacher.sample_shape, "float32"
    if run.objective.reads_stored:
        names[TARGET], names[INDEX] = (teacher.sample_shape, "float32"), ((), "int32")
        if run.guidance_range:
            names[SCALE_KEY] = (), "float32"
    if names and teacher.num_classes is not None:
        names["label"] = (), "int32"
    if teacher.text is not None:
        names[TOKENS] = teacher.text.tokenizer.row_shape, "int32"
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
        for name, (shape, dtype) in names.items()
    } or None


def _images(run: "Run") -> Batches:
    teacher, kind = run.teacher, run.objective.kind
    if teacher.decoder is not None:
        raise ConfigError(
            f"objective.kind {kind!r} learns from real images, for which this teacher, "
            "whose samples are decoded to images, has no encoder here; choose boot, "
            "continuous, pid or direct"
        )
    if run.config.teacher.source == "mixture":
        return functools.partial(_mixture_batches, run)
    dataset, tokenizer = run.dataset, None
    assert dataset is not None  # validated
    if teacher.num_classes is not None and dataset.num_classes != teacher.num_classes:
        raise ConfigError(
            f"objective.kind {kind!r} learns from images with their labels, but "
            f"{dataset.provenance} has {dataset.num_classes or 'no'} classes and the "
            f"teacher {teacher.num_classes}"
        )
    if teacher.text is not None:
        tokenizer = teacher.text.tokenizer
        if dataset.captions is None:
            raise ConfigError(
                f"objective.kind {kind!r} learns from images with their captions, but "
                f"{dataset.provenance} has no captions"
            )
    return functools.partial(
        image_batches,
        run,
        dataset,
        run.config.distill.batch_size,
        teacher.num_classes is not None,
        tokenizer,
    )


def image_batches(
    run: "Run",
    dataset: data_lib.Dataset,
    batch_size: int,
    labels: bool,
    tokenizer: Tokenizer | None,
    start_step: int,
    steps_per_dispatch: int,
) -> Iterator[Any]:
    """Real images ``[k, B, ...]`` on the mesh, with labels and tokens where asked."""
    for batch in batches(
        dataset,
        batch_size,
        run.config.seed,
        start_step,
        steps_per_dispatch,
        random_flip=run.config.data.random_flip,
        tokenizer=tokenizer,
    ):
        if not labels:
            batch.pop("label", None)
        yield run.placed_batch(batch)


def _mixture_batches(
    run: "Run", start_step: int, steps_per_dispatch: int
) -> Iterator[Any]:
    """Exact samples ``[k, B, ...]`` of a mixture; one key a step."""
    batch_size, teacher = run.config.distill.batch_size, run.teacher
    root = jax.random.key(run.config.seed, impl="threefry2x32")
    root = jax.random.fold_in(root, _MIXTURE_STREAM)

    @jax.jit
    def draw(steps: Any) -> Any:
        keys = jax.vmap(lambda step: jax.random.fold_in(root, step))(steps)
        return jax.vmap(lambda key: sample_mixture(teacher, key, batch_size))(keys)

    for first in itertools.count(start_step, steps_per_dispatch):
        steps = np.arange(first, first + steps_per_dispatch, dtype=np.uint32)
        yield run.placed_batch({IMAGE: np.asarray(draw(steps))})
