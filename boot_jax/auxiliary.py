"""The auxiliary denoiser of a correction: what the student's own samples look like.

It is the teacher's network, started from its weights and called at its own time, as the
conditional half of its guidance is. A student that is told a guidance scale has other
samples for each; so its auxiliary network is told the scale as well, by an embedding
that starts at zero.

A teacher without a network, such as an exact mixture, is given one that learns the
difference: ``g = f + sigma_r h(x_r, r)``. Where the network's last layer starts at zero
(the ``dit``'s does) that starts as the teacher, too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax import Array

from boot_jax.guidance import SCALE_KEY, Denoiser
from boot_jax.models.lora import init_adapters, merge_adapters
from boot_jax.prediction import expand
from boot_jax.student import initialiser, relative_scale
from boot_jax.teachers.base import Teacher, TeacherError, network_denoiser


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuxiliaryNetwork:
    """A denoiser that is trained, and where it starts.

    Attributes:
      denoise: ``(params, x_r [B, H, W, C], r [B], condition) -> x_0``; the condition is
        the student's.
      init: ``key -> trained``: the parameters that are trained and kept, float32.
      complete: ``(trained, teacher_params) -> params``: those that ``denoise`` takes.
    """

    denoise: Denoiser
    init: Callable[[Array], Any]
    complete: Callable[[Any, Any], Any]


def create_auxiliary(
    teacher: Teacher,
    *,
    network: nn.Module | None = None,
    guidance_range: tuple[float, float] | None = None,
    lora_rank: int = 0,
) -> AuxiliaryNetwork:
    """The auxiliary denoiser of a teacher.

    Args:
      teacher: whose network and weights it starts from.
      network: for a teacher without one.
      guidance_range: ``(w_min, w_max)`` of the scales that the student is told.
      lora_rank: of adapters that are trained instead of the network; 0 for the whole
        network.

    Raises:
      TeacherError: there is no network; or adapters are asked for, and the teacher has
        no weights that they could adapt.
    """
    base = teacher.network if network is None else network
    if base is None:
        raise TeacherError(
            "this teacher has no network that an auxiliary one could be made of; "
            "give one as `network`"
        )
    names = () if guidance_range is None else (SCALE_KEY,)
    told: Any = base.clone(added_embeddings=names)
    apply = _told_scale(told, guidance_range)
    inherited = teacher.params if network is None else None
    init = initialiser(told, teacher, inherited)
    if network is not None:
        if lora_rank:
            raise TeacherError(
                "this teacher has no weights that low-rank adapters could adapt; set "
                "objective.correction.lora_rank=0"
            )
        return AuxiliaryNetwork(
            denoise=_beside(teacher, apply),
            init=init,
            complete=lambda trained, given: {"network": trained, "teacher": given},
        )
    kind = teacher.prediction_type or "v_prediction"
    denoise = network_denoiser(apply, teacher.schedule, kind)
    if not lora_rank:
        return AuxiliaryNetwork(
            denoise=denoise, init=init, complete=lambda trained, given: trained
        )

    def adapters(key: Array) -> Any:
        return {
            "adapters": jax.jit(init_adapters, static_argnums=2)(
                inherited, key, lora_rank
            ),
            "added": {k: v for k, v in init(key).items() if k not in inherited},
        }

    return AuxiliaryNetwork(
        denoise=denoise,
        init=adapters,
        complete=lambda trained, given: (
            merge_adapters(given, trained["adapters"]) | trained["added"]
        ),
    )


def _told_scale(
    network: nn.Module, guidance_range: tuple[float, float] | None
) -> Callable[[Any, Array, Array, Any], Array]:
    """The network as a function of a student's condition."""

    def apply(params: Any, x: Array, time: Array, condition: Any) -> Array:
        added = {}
        if guidance_range is not None:
            added[SCALE_KEY] = relative_scale(condition[SCALE_KEY], guidance_range)
            condition = {k: leaf for k, leaf in condition.items() if k != SCALE_KEY}
        output = network.apply({"params": params}, x, time, condition, added)
        assert isinstance(output, Array)
        return output

    return apply


def _beside(
    teacher: Teacher, apply: Callable[[Any, Array, Array, Any], Array]
) -> Denoiser:
    schedule = teacher.schedule

    def denoise(params: Any, x_r: Array, r: Array, condition: Any) -> Array:
        known = teacher.denoise(params["teacher"], x_r, r, _without_scale(condition))
        scaled = expand(schedule.input_scale(r), x_r) * x_r
        time = schedule.time_input(r)
        learned = apply(params["network"], scaled, time, condition)
        return known + expand(schedule.sigma(r), x_r) * learned

    return denoise


def _without_scale(condition: Any) -> Any:
    if condition is None:
        return None
    return {k: leaf for k, leaf in condition.items() if k != SCALE_KEY} or None
