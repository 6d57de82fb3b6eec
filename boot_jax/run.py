"""One config in one workdir, and what follows from them: data, teacher, student."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from boot_jax import config as config_lib
from boot_jax import data as data_lib
from boot_jax import distributed, sharding, summary
from boot_jax.batches import batches
from boot_jax.conditions import Conditions
from boot_jax.guidance import Denoiser
from boot_jax.interruption import Interruption
from boot_jax.models import create_network
from boot_jax.objectives import Objective
from boot_jax.schedules import NoiseSchedule
from boot_jax.student import Student, create_student
from boot_jax.teachers import checkpoint as teacher_checkpoint
from boot_jax.teachers.base import Teacher, TeacherError, as_sampled
from boot_jax.teachers.diffusers import load_teacher as load_diffusers
from boot_jax.teachers.mixture import gaussian_mixture
from boot_jax.training.run import train
from boot_jax.training.step import denoising_loss


@dataclasses.dataclass(frozen=True)
class Run:
    """One config in one workdir, with what follows from them.

    Args:
      config: validated.
      workdir: made, and known to be this config's.
      mesh: over all devices.
      interruption: what may ask the run to stop.
    """

    config: Any
    workdir: pathlib.Path
    mesh: Mesh
    interruption: Interruption = dataclasses.field(default_factory=Interruption)

    @functools.cached_property
    def dataset(self) -> data_lib.Dataset | None:
        """The real images; None if the config names none."""
        data = self.config.data
        if not data.name:
            return None
        return data_lib.load(
            data.name,
            path=data.path or None,
            image_size=data.image_size or None,
            channels=data.channels or None,
            split=data.split,
        )

    @property
    def schedule(self) -> NoiseSchedule:
        """The config's schedule."""
        return config_lib.schedule_from(self.config.schedule)

    @property
    def objective(self) -> Objective:
        """The config's objective."""
        return config_lib.objective_from(self.config.objective)

    @property
    def network_overrides(self) -> dict[str, Any]:
        """Fields of a network that change no parameter."""
        network = self.config.network
        return {"dtype": jnp.dtype(network.dtype), "remat": network.remat}

    @functools.cached_property
    def teacher(self) -> Teacher:
        """The teacher; trained first, if it is ours to train and not there yet."""
        source = self.config.teacher.source
        if source == "mixture":
            return _mixture(self.config.teacher.mixture, self.schedule)
        if source == "diffusers":
            return _imported(self)
        folder = self.workdir / "teacher"
        if source == "checkpoint":
            folder = pathlib.Path(self.config.teacher.path)
        elif not distributed.on_main(lambda: teacher_checkpoint.exists(folder)):
            _train_teacher(self, folder)
        loaded = teacher_checkpoint.load_teacher(folder, **self.network_overrides)
        _check_teacher(self, loaded)
        return loaded

    @functools.cached_property
    def placed_teacher(self) -> Teacher:
        """The teacher with its parameters on the mesh, in the type they are kept in."""
        mesh, dtype = self.config.mesh, jnp.dtype(self.config.teacher.param_dtype)

        def kept(leaf: Any) -> np.ndarray:
            host = np.asarray(leaf)
            return host.astype(dtype) if host.dtype == np.float32 else host

        params = jax.tree.map(kept, self.teacher.params)
        where = sharding.parameter_shardings(
            params, self.mesh, mesh.teacher_rules, mesh.fsdp_min_size
        )
        return dataclasses.replace(self.teacher, params=sharding.place(params, where))

    @functools.cached_property
    def student(self) -> Student:
        """The student, untrained."""
        network = None
        if self.teacher.network is None:
            network = self._new_network()
        return create_student(
            self.teacher,
            t_max=self.objective.t_max,
            network=network,
            time_conditioning=self.config.student.time_conditioning,
            guidance_range=self.guidance_range,
            num_half_waves=self.config.student.num_half_waves,
        )

    def _new_network(self) -> nn.Module:
        """For the student of a teacher that has none."""
        section = self.config.network
        try:
            return create_network(
                section.name,
                sample_shape=self.teacher.sample_shape,
                num_classes=self.teacher.num_classes,
                **section[section.name],
                **self.network_overrides,
            )
        except ValueError as error:
            raise config_lib.ConfigError(f"network: {error}") from error

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """The range of drawn guidance scales; None for a fixed one."""
        drawn = tuple(self.config.teacher.guidance_range)
        return (drawn[0], drawn[1]) if drawn else None

    @property
    def conditions(self) -> Conditions:
        """What batches are conditioned on."""
        return Conditions(self.teacher.num_classes, self.guidance_range)

    @functools.cached_property
    def denoise(self) -> Denoiser:
        """The teacher as its sampler runs it.

        Raises:
          ConfigError: it is to be guided, but takes no labels, or none that means none.
        """
        teacher = self.config.teacher
        guided = teacher.guidance_scale != 1.0 or teacher.guidance_range
        if guided and self.teacher.num_classes is None:
            raise config_lib.ConfigError(
                "guidance needs a class-conditional teacher, which this one is not; "
                "set teacher.guidance_scale=1.0 and teacher.guidance_range=()"
            )
        if guided and not self.teacher.has_null_label:
            raise config_lib.ConfigError(
                "guidance needs a label that means none, which this teacher is not "
                "known to have; if its last class is that, set teacher.null_label=True"
            )
        return as_sampled(
            self.teacher.denoise,
            null_condition=self.conditions.null(),
            guidance_scale=None if self.guidance_range else teacher.guidance_scale,
            thresholding=self.teacher.thresholding or teacher.thresholding,
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """What a checkpoint of the student keeps beside the state."""
        return {
            "identity": {
                "teacher": self.teacher.fingerprint(),
                "schedule": repr(self.teacher.schedule),
                "prediction type": self.teacher.prediction_type,
            },
            "config": json.loads(config_lib.to_json(self.config)),
            "versions": summary.versions(),
        }


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


def _check_teacher(run: Run, teacher: Teacher) -> None:
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


def _imported(run: Run) -> Teacher:
    """A teacher in diffusers format, which decides its schedule and conversion."""
    section = run.config.teacher
    teacher = load_diffusers(
        section.path,
        revision=section.revision,
        null_label=section.null_label,
        **run.network_overrides,
    )
    _check_images(run, teacher)
    if teacher.decoder is not None and run.dataset is not None:
        raise config_lib.ConfigError(
            "this teacher's samples are decoded to images, which are not yet scored "
            'against real ones; set data.name=""'
        )
    return teacher


def _check_images(run: Run, teacher: Teacher) -> None:
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


def _train_teacher(run: Run, folder: pathlib.Path) -> None:
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
        batches=functools.partial(_placed_batches, run, dataset),
        key=jax.random.key(config.seed, impl="threefry2x32"),
        training=training,
        config=config,
        mesh=run.mesh,
        interruption=run.interruption,
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


def _placed_batches(
    run: Run, dataset: data_lib.Dataset, start_step: int, steps_per_dispatch: int
) -> Iterator[Any]:
    """Batches ``[k, B, ...]`` on the mesh, split over the second axis."""
    where = sharding.batch_sharding(run.mesh, axis=1)
    for batch in batches(
        dataset,
        run.config.teacher.training.batch_size,
        run.config.seed,
        start_step,
        steps_per_dispatch,
        random_flip=run.config.data.random_flip,
    ):
        if not run.config.data.labels:
            batch = {"image": batch["image"]}
        yield jax.tree.map(
            # Every process reads the global batch, and places what is its own.
            lambda leaf: jax.make_array_from_process_local_data(
                where, leaf, leaf.shape
            ),
            batch,
        )
