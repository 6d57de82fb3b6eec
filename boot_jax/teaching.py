"""Where a run's teacher comes from: trained here, read, imported, or exact."""

import functools
import json
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from boot_jax import config as config_lib
from boot_jax import data as data_lib
from boot_jax import distributed, sharding, summary
from boot_jax.conditions import Conditions
from boot_jax.models import is_convolutional
from boot_jax.schedules import NoiseSchedule
from boot_jax.student_batches import image_batches
from boot_jax.teachers import checkpoint as teacher_checkpoint
from boot_jax.teachers.base import Teacher, TeacherError
from boot_jax.teachers.diffusers import load_teacher as load_diffusers
from boot_jax.teachers.flax_pipeline import load_teacher as load_flax_pipeline
from boot_jax.teachers.mixture import gaussian_mixture
from boot_jax.tokenizers import WordTokenizer
from boot_jax.training.denoising import denoising_loss
from boot_jax.training.run import train

if TYPE_CHECKING:
    from boot_jax.run import Run

# Captions whose words become the vocabulary of a teacher of our own.
_CAPTIONS_FOR_WORDS = 100_000


def teacher_of(run: "Run") -> Teacher:
    """The teacher that a run's config names.

    Raises:
      ConfigError: the config does not go with it.
      TeacherError: it is missing, foreign, or not what the config says.
    """
    source = run.config.teacher.source
    if source == "mixture":
        return _mixture(run.config.teacher.mixture, run.schedule)
    if source in ("diffusers", "flax_pipeline"):
        return _imported(run)
    folder = run.workdir / "teacher"
    if source == "checkpoint":
        folder = pathlib.Path(run.config.teacher.path)
    elif not distributed.on_main(lambda: teacher_checkpoint.exists(folder)):
        _train_teacher(run, folder)
    loaded = teacher_checkpoint.load_teacher(folder, **run.network_overrides)
    _check_teacher(run, loaded)
    return loaded


def _mixture(mixture: Any, schedule: NoiseSchedule) -> Teacher:
    shape = (-1, *mixture.sample_shape)
    try:
        means = np.asarray(mixture.means, np.float32).reshape(shape)
    except ValueError as error:
        raise config_lib.ConfigError(
            "teacher.mixture.means must hold H * W * C numbers for each component of "
            f"shape {tuple(mixture.sample_shape)}"
        ) from error
    return gaussian_mixture(means, np.asarray(mixture.scales, np.float32), schedule)


def _check_teacher(run: "Run", teacher: Teacher) -> None:
    """Refuses a teacher that is not what the config says it is."""
    config = run.config
    pairs = [
        ("schedule", teacher.schedule, run.schedule),
        (
            "teacher.prediction_type",
            teacher.prediction_type,
            config.teacher.prediction_type,
        ),
    ]
    _check_images(run, teacher)
    for field, has, wanted in pairs:
        if has != wanted:
            raise TeacherError(
                f"the teacher has {field} {has}, but the config says {wanted}; "
                f"set config.{field} to what the teacher was trained with"
            )


def _imported(run: "Run") -> Teacher:
    """A teacher in diffusers format, which decides its schedule and conversion."""
    section = run.config.teacher
    options = {"revision": section.revision, **run.network_overrides}
    if section.source == "flax_pipeline":
        teacher = load_flax_pipeline(section.path, **options)
    else:
        options["null_label"] = section.null_label
        teacher = load_diffusers(section.path, **options)
    _check_images(run, teacher)
    if teacher.decoder is not None and run.dataset is not None:
        raise config_lib.ConfigError(
            "this teacher's samples are decoded to images, which are not yet scored "
            'against real ones; set data.name=""'
        )
    return teacher


def _check_images(run: "Run", teacher: Teacher) -> None:
    """Refuses a teacher of other images than the config's ``data``."""
    data, dataset = run.config.data, run.dataset
    has = height, width, channels = teacher.image_shape
    size = data.image_size
    wanted = (size or height, size or width, data.channels or channels)
    if dataset is not None:
        wanted = dataset.image_shape
    if has != wanted:
        raise TeacherError(
            f"the teacher makes images of {has}, but config.data says {wanted}; set "
            'config.data to what the teacher was trained with, or data.name="" '
            "(with image_size=0 and channels=0) to score without real images"
        )


def _train_teacher(run: "Run", folder: pathlib.Path) -> None:
    """Trains with the denoising loss on real images; writes the teacher's folder."""
    config, dataset = run.config, run.dataset
    assert dataset is not None  # validated
    training = config.teacher.training
    sharding.check_batch_size(
        "teacher.training.batch_size",
        training.batch_size,
        run.mesh,
        training.microbatches,
    )
    num_classes = dataset.num_classes if config.data.labels else None
    if config.data.labels and num_classes is None:
        raise config_lib.ConfigError(
            f"data.labels is set, but {dataset.provenance} has no labels"
        )
    tokenizer = _words(dataset) if config.data.captions else None
    name = config.network.name
    options = config.network[name].to_dict()
    description = teacher_checkpoint.describe(
        network=name,
        network_options=options,
        schedule=config.schedule.name,
        schedule_options=config_lib.schedule_options(config.schedule),
        prediction_type=config.teacher.prediction_type,
        sample_shape=dataset.image_shape,
        num_classes=num_classes,
        tokenizer=tokenizer,
    )
    network = teacher_checkpoint.from_description(
        description, **run.network_overrides
    ).network
    assert network is not None
    state = train(
        folder,
        "teacher",
        loss=denoising_loss(
            network=network,
            schedule=run.schedule,
            prediction_type=config.teacher.prediction_type,
            conditions=Conditions(num_classes),
            label_dropout=config.teacher.label_dropout,
        ),
        init=teacher_checkpoint.initialiser(network, dataset.image_shape, num_classes),
        frozen=None,
        batches=functools.partial(
            image_batches,
            run,
            dataset,
            training.batch_size,
            config.data.labels,
            tokenizer,
        ),
        key=jax.random.key(config.seed, impl="threefry2x32"),
        training=training,
        config=config,
        mesh=run.mesh,
        interruption=run.interruption,
        convolutional=is_convolutional(network),
        metadata={
            "identity": {"model": description},
            "config": json.loads(config_lib.to_json(config)),
            "versions": summary.versions(),
        },
    )
    params = sharding.to_host(state.ema_params)
    distributed.on_main(
        lambda: teacher_checkpoint.save_teacher(folder, description, params)
    )


def _words(dataset: data_lib.Dataset) -> WordTokenizer:
    """The words of the captions of a data set."""
    if dataset.captions is None:
        raise config_lib.ConfigError(
            f"data.captions is set, but {dataset.provenance} has no captions"
        )
    some = np.arange(min(len(dataset), _CAPTIONS_FOR_WORDS))
    return WordTokenizer.from_prompts(dataset.captions(some))
