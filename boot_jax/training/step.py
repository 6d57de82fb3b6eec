"""What happens in a step: two losses over a key, and one update for both.

A loss here is ``loss(params, ema_params, frozen, batch, key, progress) -> (loss,
metrics)``: ``frozen`` is what is not trained (the teacher's parameters), ``batch`` is
real data or None, and everything random comes from ``key``, which the update derives
from the run's key and the step. So a run is a function of its seed alone.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import NamedSharding

from boot_jax.conditions import Conditions
from boot_jax.guidance import Denoiser
from boot_jax.objectives import LOSSES, Objective, Signal, draw_times
from boot_jax.prediction import expand, from_x_0
from boot_jax.schedules import NoiseSchedule
from boot_jax.solvers import add_noise
from boot_jax.training.state import TrainState, update_ema

Loss = Callable[..., tuple[Array, dict[str, Array]]]


def distillation_loss(
    *,
    signal: Signal,
    denoise: Denoiser,
    schedule: NoiseSchedule,
    objective: Objective,
    conditions: Conditions,
    sample_shape: tuple[int, ...],
    batch_size: int,
    batch_sharding: NamedSharding | None = None,
) -> Loss:
    """The objective on noise, times and conditions that it draws itself: no data."""

    def loss(
        params: Any,
        ema_params: Any,
        frozen: Any,
        batch: None,
        key: Array,
        progress: Any,
    ) -> tuple[Array, dict[str, Array]]:
        noise_key, time_key, condition_key = jax.random.split(key, 3)
        drawn = (
            jax.random.normal(noise_key, (batch_size, *sample_shape)),
            draw_times(objective, time_key, batch_size, progress),
            conditions.draw(condition_key, batch_size),
        )
        if batch_sharding is not None:
            drawn = jax.lax.with_sharding_constraint(drawn, batch_sharding)
        eps, t, condition = drawn
        return LOSSES[objective.kind](
            params,
            frozen,
            eps,
            t,
            condition,
            signal=signal,
            denoise=denoise,
            schedule=schedule,
            objective=objective,
            target_params=ema_params if objective.target_network == "ema" else None,
        )

    return loss


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

    Times are uniform in ``[t_min, 1]``, stratified over the batch. For
    class-conditional networks a share ``label_dropout`` of the labels becomes the null
    label, so that the teacher can be guided.
    """
    times = Objective(kind="continuous", t_min=t_min, delta=1e-3)
    dropout: Any = {"deterministic": False} if getattr(network, "dropout", 0.0) else {}

    def loss(
        params: Any,
        ema_params: Any,
        frozen: None,
        batch: dict[str, Array],
        key: Array,
        progress: Any,
    ) -> tuple[Array, dict[str, Array]]:
        noise_key, time_key, label_key, dropout_key = jax.random.split(key, 4)
        x_0 = batch["image"]
        eps = jax.random.normal(noise_key, x_0.shape)
        t = draw_times(times, time_key, x_0.shape[0])
        condition = None
        if conditions.num_classes is not None:
            dropped = jax.random.bernoulli(label_key, label_dropout, x_0.shape[:1])
            label = jnp.where(dropped, conditions.num_classes, batch["label"])
            condition = {"label": label}
        x_t = add_noise(schedule, x_0, eps, t)
        output = network.apply(
            {"params": params},
            expand(schedule.input_scale(t), x_t) * x_t,
            schedule.time_input(t),
            condition,
            **dropout,
            rngs={"dropout": dropout_key},
        )
        assert isinstance(output, Array)
        target = from_x_0(
            prediction_type, x_0, eps, schedule.alpha(t), schedule.sigma(t)
        )
        error = jnp.mean((output - target) ** 2)
        return error, {"loss/denoising": error}

    return loss


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    num_steps: int,
    steps_per_dispatch: int = 1,
    state_sharding: Any = None,
) -> Callable[[TrainState, Any, Any, Array], tuple[TrainState, dict[str, Array]]]:
    """Compiles ``train_step(state, frozen, batches, key)``: k updates in one dispatch.

    The state is donated. ``batches`` is None, or a tree with leading sizes ``[k, B]``.

    Returns:
      A function that gives the new state and ``{name: [k]}`` metrics: the loss and its
      parts, ``grad_norm``, all float32.
    """

    def update(
        state: TrainState, frozen: Any, batch: Any, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(key, state.step)
        progress = state.step / num_steps
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
            state.params, state.ema_params, frozen, batch, key, progress
        )
        # Optax raises a float to the power of an integer count.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(
            step=state.step + 1,
            params=params,
            ema_params=update_ema(state.ema_params, params, state.step, ema_decay),
            opt_state=opt_state,
        )
        metrics = {"loss": value, **metrics, "grad_norm": optax.tree.norm(grads)}
        return new, metrics

    def train_step(
        state: TrainState, frozen: Any, batches: Any, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        if steps_per_dispatch == 1:
            batch = jax.tree.map(lambda leaf: leaf[0], batches)
            state, metrics = update(state, frozen, batch, key)
            return state, jax.tree.map(lambda metric: metric[None], metrics)
        return jax.lax.scan(
            lambda state, batch: update(state, frozen, batch, key),
            state,
            batches,
            length=steps_per_dispatch,
        )

    return jax.jit(train_step, donate_argnums=0, out_shardings=(state_sharding, None))
