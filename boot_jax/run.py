"""One config in one workdir, and what follows from them: data, teacher, student."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from boot_jax import config as config_lib
from boot_jax import data as data_lib
from boot_jax import sharding, summary, teaching
from boot_jax.auxiliary import AuxiliaryNetwork, create_auxiliary
from boot_jax.conditions import Conditions, Encode, prompt_encoder
from boot_jax.guidance import NEGATIVE_KEY, Denoiser, rescaling
from boot_jax.interruption import Interruption
from boot_jax.models import create_network
from boot_jax.objectives import Objective
from boot_jax.prediction import PREDICTION_TYPES
from boot_jax.prompted import Prompts, open_prompts
from boot_jax.prompts import prompt_batches
from boot_jax.sampling import stored_noise
from boot_jax.schedules import NoiseSchedule
from boot_jax.student import Student, create_student
from boot_jax.teachers.base import Teacher, TextEncoder, as_sampled
from boot_jax.training.correction import corrected_loss
from boot_jax.training.distillation import distillation_loss
from boot_jax.training.step import Loss


@dataclasses.dataclass(frozen=True)
class Run:
    """One config in one workdir, with what follows from them.

    Args:
      config: validated.
      workdir: made, and known to be this config's.
      mesh: over all devices.
      interruption: what may ask the run to stop.
      loaded_teacher: the teacher, where several runs share one; None to find it.
    """

    config: Any
    workdir: pathlib.Path
    mesh: Mesh
    interruption: Interruption = dataclasses.field(default_factory=Interruption)
    loaded_teacher: Teacher | None = None

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
        chosen = None if network.attention == "auto" else network.attention
        return {
            "dtype": jnp.dtype(network.dtype),
            "remat": network.remat,
            "attention_implementation": chosen,
        }

    @functools.cached_property
    def teacher(self) -> Teacher:
        """The teacher; trained first, if it is ours to train and not there yet."""
        return self.loaded_teacher or teaching.teacher_of(self)

    @functools.cached_property
    def placed_teacher(self) -> Teacher:
        """The teacher with its parameters on the mesh, in the type they are kept in."""
        params = self._placed(self.teacher.params)
        return dataclasses.replace(self.teacher, params=params)

    @functools.cached_property
    def placed_text(self) -> TextEncoder:
        """Its text encoder alike; apart, as embeddings made before do without."""
        assert self.teacher.text is not None
        params = self._placed(self.teacher.text.params)
        return dataclasses.replace(self.teacher.text, params=params)

    def _placed(self, params: Any) -> Any:
        mesh, dtype = self.config.mesh, jnp.dtype(self.config.teacher.param_dtype)

        def kept(leaf: Any) -> np.ndarray:
            host = np.asarray(leaf)
            return host.astype(dtype) if host.dtype == np.float32 else host

        params = jax.tree.map(kept, params)
        where = sharding.parameter_shardings(
            params, self.mesh, mesh.teacher_rules, mesh.fsdp_min_size
        )
        return sharding.place(params, where)

    @functools.cached_property
    def prompts(self) -> Prompts | None:
        """The prompts to learn from; None where the teacher takes none."""
        section, text = self.config.prompts, self.teacher.text
        if text is not None:
            return open_prompts(section, text, self.workdir, guided=self.is_guided)
        if section.path:
            raise config_lib.ConfigError(
                "prompts.path is set, but this teacher takes no prompts; leave it empty"
            )
        return None

    def loss(
        self,
        encode: Encode | None,
        batch_sharding: NamedSharding | None = None,
        objective: Objective | None = None,
        denoise: Denoiser | None = None,
        reference_variance: float | None = None,
    ) -> Loss:
        """Of the distillation.

        ``objective`` and ``denoise`` are the run's own, where there are no others; see
        `boot_jax.training.distillation`, and `boot_jax.training.correction` for the
        last argument.
        """
        objective, noise_of = objective or self.objective, None
        if objective.reads_stored:
            seed, shape = self.config.seed, self.teacher.sample_shape
            noise_of = functools.partial(stored_noise, seed, sample_shape=shape)
        shared: dict[str, Any] = {
            "signal": self.student.signal,
            "schedule": self.teacher.schedule,
            "objective": objective,
            "batch_sharding": batch_sharding,
            "encode": encode,
        }
        trajectories = distillation_loss(
            denoise=denoise or self.denoise,
            student_denoise=self.student.denoise,
            jump=self.student.jump,
            noise_of=noise_of,
            conditions=self.conditions,
            sample_shape=self.teacher.sample_shape,
            batch_size=self.config.distill.batch_size,
            **shared,
        )
        correction = self.objective.correction
        if correction.strength == 0:
            return trajectories
        interval = correction.guidance_interval
        return corrected_loss(
            trajectories,
            network=self._auxiliary(),
            denoise=self._guided(interval) if interval else self.denoise,
            reference_variance=reference_variance,
            **shared,
        )

    def _auxiliary(self) -> AuxiliaryNetwork:
        return create_auxiliary(
            self.teacher,
            network=self._new_network() if self.teacher.network is None else None,
            guidance_range=self.guidance_range,
            lora_rank=self.objective.correction.lora_rank,
        )

    @property
    def encode(self) -> Encode | None:
        """What makes conditions of the prompts, or captions, of a batch."""
        text = self.teacher.text
        if text is not None and self.objective.needs_images:
            negative = self.config.prompts.negative if self.is_guided else None
            return prompt_encoder(text, negative)
        return None if self.prompts is None else self.prompts.encode

    @property
    def frozen(self) -> Any:
        """What distillation reads and does not train, on the mesh."""
        teacher = self.placed_teacher.params
        if self.teacher.text is not None and self.objective.needs_images:
            return {"teacher": teacher, "text": self.placed_text.params}
        prompts = self.prompts
        if prompts is None:
            return teacher
        if prompts.rows is prompts.cache:
            return {"teacher": teacher, "text": self.placed_text.params}
        null = sharding.place(prompts.params, sharding.replicated(self.mesh))
        return {"teacher": teacher, "text": null}

    def prompt_batches(self, start_step: int, steps_per_dispatch: int) -> Iterator[Any]:
        """Prompts ``[k, B, ...]`` on the mesh."""
        assert self.prompts is not None
        training = self.config.distill
        for batch in prompt_batches(
            self.prompts.rows,
            training.batch_size,
            self.config.seed,
            start_step,
            steps_per_dispatch,
        ):
            yield self.placed_batch(batch)

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
            time_conditioning=self._time_conditioning,
            output=self.config.student.output,
            guidance_range=self.guidance_range,
            num_half_waves=self.config.student.num_half_waves,
        )

    @property
    def _time_conditioning(self) -> str:
        chosen = self.config.student.time_conditioning
        if chosen != "auto":
            return chosen
        return "added" if self.objective.has_target_time else "noise_level"

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

    @property
    def is_guided(self) -> bool:
        """Whether the teacher has an unconditional half."""
        teacher = self.config.teacher
        return teacher.guidance_scale != 1.0 or bool(teacher.guidance_range)

    @functools.cached_property
    def denoise(self) -> Denoiser:
        """The teacher as its sampler runs it.

        Raises:
          ConfigError: it is to be guided, but takes neither prompts nor labels, or no
            label that means none.
        """
        return self._guided(self.config.teacher.guidance_interval)

    def _guided(self, interval: Sequence[float]) -> Denoiser:
        section, teacher = self.config.teacher, self.teacher
        if self.is_guided and teacher.text is None:
            _check_can_be_guided(teacher)
        null = self.conditions.null() if teacher.text is None else NEGATIVE_KEY
        rescale = None
        if section.guidance_rescale:
            if teacher.prediction_type not in PREDICTION_TYPES:
                raise config_lib.ConfigError(
                    "teacher.guidance_rescale needs a teacher whose network predicts "
                    f"one of {', '.join(PREDICTION_TYPES)}; set it to 0"
                )
            rescale = rescaling(
                teacher.prediction_type, teacher.schedule, section.guidance_rescale
            )
        low, high = interval
        return as_sampled(
            teacher.denoise,
            null_condition=null if self.is_guided else None,
            guidance_scale=None if self.guidance_range else section.guidance_scale,
            thresholding=teacher.thresholding or section.thresholding,
            interval=(low, high),
            rescale=rescale,
        )

    def placed_batch(self, batch: Any) -> Any:
        """A global batch ``[k, B, ...]``, of which every device takes its own part."""
        where = sharding.batch_sharding(self.mesh, axis=1)
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(
                where, leaf, leaf.shape
            ),
            batch,
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


def _check_can_be_guided(teacher: Teacher) -> None:
    if teacher.num_classes is None:
        raise config_lib.ConfigError(
            "guidance needs a class-conditional teacher or one that takes prompts, "
            "which this one is not; set teacher.guidance_scale=1.0 and "
            "teacher.guidance_range=()"
        )
    if not teacher.has_null_label:
        raise config_lib.ConfigError(
            "guidance needs a label that means none, which this teacher is not "
            "known to have; if its last class is that, set teacher.null_label=True"
        )
