"""What a teacher's training minimises: the denoising loss, on real images."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from boot_jax.conditions import Conditions
from boot_jax.objectives import Objective, draw_times
from boot_jax.prediction import expand, from_x_0
from boot_jax.schedules import NoiseSchedule
from boot_jax.solvers import add_noise
from boot_jax.tokenizers.words import PADDING
from boot_jax.training.microbatches import split_batch
from boot_jax.training.step import Loss


def denoising_loss(
    *,
    network: nn.Module,
    schedule: NoiseSchedule,
    prediction_type: str,
    conditions: Conditions,
    label_dropout: float = 0.1,
    t_min: float = 1e-3,
) -> Loss:
    """Teacher training: the mean squared error of what the network predicts.

    Times are uniform in ``[t_min, 1]``, stratified over the batch. A share
    ``label_dropout`` of the labels becomes the null label, or of the batch's captions
    ``tokens [B, L]`` the empty prompt, so that the teacher can be guided.
    """
    times_of = Objective(kind="continuous", t_min=t_min, delta=1e-3)
    dropout: Any = {"deterministic": False} if getattr(network, "dropout", 0.0) else {}

    def draw(
        batch: dict[str, Array], key: Array, progress: Any, microbatches: int
    ) -> Any:
        noise_key, time_key, label_key = jax.random.split(key, 3)
        images = split_batch(batch["image"], microbatches)
        times = draw_times(times_of, time_key, batch["image"].shape[0])
        inputs = {
            "x_0": images,
            "eps": jax.random.normal(noise_key, images.shape),
            "t": split_batch(times, microbatches),
        }
        if conditions.num_classes is not None:
            label = batch["label"]
            dropped = jax.random.bernoulli(label_key, label_dropout, label.shape)
            label = jnp.where(dropped, conditions.num_classes, label)
            inputs["label"] = split_batch(label, microbatches)
        if "tokens" in batch:
            tokens = batch["tokens"]
            dropped = jax.random.bernoulli(label_key, label_dropout, tokens.shape[:1])
            tokens = jnp.where(expand(dropped, tokens), PADDING, tokens)
            inputs["tokens"] = split_batch(tokens, microbatches)
        return inputs

    def value(
        params: Any, ema_params: Any, frozen: None, inputs: dict[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        x_0, eps, t = inputs["x_0"], inputs["eps"], inputs["t"]
        told = {name: inputs[name] for name in ("label", "tokens") if name in inputs}
        condition = told or None
        x_t = add_noise(schedule, x_0, eps, t)
        output = network.apply(
            {"params": params},
            expand(schedule.input_scale(t), x_t) * x_t,
            schedule.time_input(t),
            condition,
            **dropout,
            rngs={"dropout": key},
        )
        assert isinstance(output, Array)
        target = from_x_0(
            prediction_type, x_0, eps, schedule.alpha(t), schedule.sigma(t)
        )
        error = jnp.mean((output - target) ** 2)
        return error, {"loss/denoising": error}

    return Loss(draw, value)
