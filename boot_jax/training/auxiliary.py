"""A second network that is trained within the step of the first."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from boot_jax.training.microbatches import mean_over_microbatches
from boot_jax.training.state import AuxiliaryState


@dataclasses.dataclass(frozen=True)
class Auxiliary:
    """What is trained beside the first network, before each of its updates.

    Attributes:
      init: ``key -> params``.
      optimizer: its own.
      updates: for each one of the first network.
      draw: ``(inputs, key, microbatches) -> inputs`` of one update: a tree of ``[m,
        ...]``, out of those of the step.
      value: ``(auxiliary_params, params, frozen, inputs) -> (loss, metrics)`` of one
        microbatch, ``params`` of the first network.
      decay: of its rate over the training: ``constant``, or ``cosine`` to zero.
    """

    init: Callable[[Array], Any]
    optimizer: optax.GradientTransformation
    updates: int
    draw: Callable[[Any, Array, int], Any]
    value: Callable[[Any, Any, Any, Any], tuple[Array, dict[str, Array]]]
    decay: str = "constant"

    def create(self, key: Array) -> AuxiliaryState:
        """Its state before the first step."""
        return self.state_of(self.init(key))

    def state_of(self, params: Any) -> AuxiliaryState:
        """The state of given parameters, with a fresh optimizer."""
        return AuxiliaryState(params=params, opt_state=self.optimizer.init(params))

    def train(
        self,
        state: AuxiliaryState,
        params: Any,
        frozen: Any,
        inputs: Any,
        key: Array,
        progress: Array,
        microbatches: int,
    ) -> tuple[AuxiliaryState, dict[str, Array]]:
        """Makes the updates of one step.

        Args:
          state: before them.
          params: of the first network.
          frozen: what is not trained.
          inputs: of the step.
          key: of the step.
          progress: of the training, from 0 to 1.
          microbatches: the gradient is the mean over so many parts.

        Returns:
          The state after them, and the metrics of the last.
        """

        def update(state: AuxiliaryState, index: Any) -> tuple[AuxiliaryState, Any]:
            drawn = self.draw(inputs, jax.random.fold_in(key, index), microbatches)

            def of_one(_: Any, part: Any) -> Any:
                return jax.value_and_grad(self.value, has_aux=True)(
                    state.params, params, frozen, part
                )

            (_, metrics), grads = mean_over_microbatches(of_one, drawn, microbatches)
            # Optax raises a float to the power of an integer count.
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = self.optimizer.update(
                    grads, state.opt_state, state.params
                )
            if self.decay == "cosine":
                rate = 0.5 * (1 + jnp.cos(jnp.pi * progress))
                updates = jax.tree.map(
                    lambda leaf: rate.astype(leaf.dtype) * leaf, updates
                )
            moved = optax.apply_updates(state.params, updates)
            return AuxiliaryState(params=moved, opt_state=opt_state), metrics

        if self.updates == 1:
            return update(state, 0)
        state, metrics = jax.lax.scan(update, state, jnp.arange(self.updates))
        return state, jax.tree.map(lambda metric: metric[-1], metrics)


def auxiliary_optimizer(
    learning_rate: float, b1: float, b2: float
) -> optax.GradientTransformation:
    """Adam at a constant rate; without momentum (``b1 = 0``) it has one moment less."""
    moments = (
        optax.scale_by_adam(b1=b1, b2=b2)
        if b1
        else optax.scale_by_rms(decay=b2, eps_in_sqrt=False, bias_correction=True)
    )
    return optax.chain(moments, optax.scale(-learning_rate))
