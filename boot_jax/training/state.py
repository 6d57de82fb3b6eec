"""The training state, its optimizer and its moving average."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

LEARNING_RATE_DECAYS = ("constant", "cosine")


class AuxiliaryState(flax.struct.PyTreeNode):
    """Of a second network, which is trained beside the first and not averaged.

    Attributes:
      params: float32 parameters.
      opt_state: its own optimizer's.
    """

    params: Any
    opt_state: Any


class TrainState(flax.struct.PyTreeNode):
    """All that a run remembers; noise, times and labels are functions of seed and step.

    Attributes:
      step: int32 scalar, the number of updates made.
      params: float32 parameters.
      ema_params: their exponential moving average, which is what gets used.
      opt_state: the optimizer's.
      skipped: int32 scalar, the updates left out because they were not finite.
      auxiliary: an `AuxiliaryState`; None where there is no second network.
    """

    step: Array
    params: Any
    ema_params: Any
    opt_state: Any
    skipped: Array
    auxiliary: Any = None


def create_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    auxiliary: AuxiliaryState | None = None,
) -> TrainState:
    """A state at step 0, whose average is a copy of the parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        skipped=jnp.zeros((), jnp.int32),
        auxiliary=auxiliary,
    )


def create_optimizer(
    *,
    learning_rate: float,
    num_steps: int,
    warmup_steps: int = 0,
    decay: str = "constant",
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW with linear warm-up, then constant or cosine-decayed to zero, and clipping.

    Raises:
      ValueError: the decay is not known.
    """
    if decay not in LEARNING_RATE_DECAYS:
        raise ValueError(
            f"learning-rate decay is {decay!r}; choose one of {LEARNING_RATE_DECAYS}"
        )
    if decay == "cosine":
        rate = optax.warmup_cosine_decay_schedule(
            0.0, learning_rate, warmup_steps, max(num_steps, warmup_steps + 1)
        )
    else:
        # Optax stays at the first value for ever if there are no steps to warm up in.
        start = 0.0 if warmup_steps else learning_rate
        rate = optax.warmup_constant_schedule(start, learning_rate, warmup_steps)
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay),
    )


def update_ema(ema_params: Any, params: Any, step: Array, decay: float) -> Any:
    """Moves the average; the decay grows from 0.1 so that early steps do not linger.

    The decay at step n is ``min(decay, (1 + n) / (10 + n))``.
    """
    count = step.astype(jnp.float32)
    weight = 1 - jnp.minimum(decay, (1 + count) / (10 + count))
    return jax.tree.map(
        lambda average, new: average + weight.astype(average.dtype) * (new - average),
        ema_params,
        params,
    )
