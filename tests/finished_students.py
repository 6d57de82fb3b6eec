"""Small students with random weights everywhere, as a training would leave them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from boot_jax.export.finished import FinishedStudent
from boot_jax.models import create_network
from boot_jax.models.transformer import Transformer
from boot_jax.objectives import Objective
from boot_jax.schedules import NoiseSchedule, get_schedule
from boot_jax.student import create_student
from boot_jax.teachers.base import Teacher, network_denoiser

UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "patch_size": 2,
    "norm_eps": 1e-6,
}
DIT = {"patch_size": 2, "hidden_size": 16, "num_layers": 2, "num_heads": 2}


def random_params(shapes: Any, seed: int = 0) -> Any:
    """Every leaf matters, those that start at zero among them."""
    random = np.random.default_rng(seed)

    def leaf(path: Any, shape: Any) -> np.ndarray:
        centre = 1 if path[-1].key == "scale" else 0
        values = centre + 0.3 * random.standard_normal(shape.shape)
        return np.asarray(values, np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def finished_student(
    network: str = "unet",
    *,
    schedule: NoiseSchedule | None = None,
    prediction_type: str = "v_prediction",
    sample_shape: tuple[int, int, int] = (8, 8, 1),
    num_classes: int | None = None,
    t_max: float = 1.0,
    time_conditioning: str = "added",
    guidance_scale: float | None = None,
    **options: Any,
) -> FinishedStudent:
    """A student that no one has trained, but whose every weight matters."""
    schedule = schedule or get_schedule("cosine")
    if network == "transformer":
        sizes = {"sample_size": sample_shape[0], "in_channels": sample_shape[2]}
        labels = {"num_embeds_ada_norm": num_classes}
        model = Transformer.from_config(TRANSFORMER | sizes | labels, **options)
    else:
        model = create_network(
            network,
            sample_shape=sample_shape,
            num_classes=num_classes,
            **({"unet": UNET, "dit": DIT}[network] | options),
        )
    condition = None if num_classes is None else {"label": jnp.zeros(1, jnp.int32)}
    shapes = jax.eval_shape(
        lambda key: model.init(
            key, jnp.zeros((1, *sample_shape)), jnp.ones(1), condition
        )["params"],
        jax.random.key(0),
    )
    teacher = Teacher(
        denoise=network_denoiser(model, schedule, prediction_type),
        params=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
        schedule=schedule,
        sample_shape=sample_shape,
        num_classes=num_classes,
        network=model,
        prediction_type=prediction_type,
    )
    student = create_student(
        teacher,
        t_max=t_max,
        time_conditioning=time_conditioning,
        guidance_range=None if guidance_scale is None else (1.0, 4.0),
    )
    return FinishedStudent(
        student=student,
        params=random_params(jax.eval_shape(student.init, jax.random.key(0))),
        teacher=teacher,
        objective=Objective(kind="continuous", t_max=t_max),
        guidance_scale=guidance_scale,
    )
