"""What happens in a step: a loss over a key, and one update of its parameters.

A `Loss` draws its inputs from a key, and is a pure function of them. Everything random
comes from the key, which the update derives from the run's key and the step. So a run
is a function of its seed alone, on however many devices and in however many
microbatches.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import NamedSharding

from boot_jax.training import health
from boot_jax.training.auxiliary import Auxiliary
from boot_jax.training.microbatches import mean_over_microbatches
from boot_jax.training.state import TrainState, update_ema

# No microbatch has this number.
_AUXILIARY_STREAM = 2**31


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a training minimises.

    Attributes:
      draw: ``(batch, key, progress, microbatches) -> inputs``: a tree of ``[m, B / m,
        ...]`` whose numbers do not depend on ``m``. ``batch`` is real data ``{name: [B,
        ...]}`` or None.
      value: ``(params, ema_params, frozen, inputs, key) -> (loss, metrics)`` of one
        microbatch; ``frozen`` is what is not trained, such as the teacher's parameters,
        and ``key`` is for what images do not share a stream in, such as dropout.
      auxiliary: a second network that is trained before each update; ``value`` is then
        given ``(frozen, its parameters)`` as ``frozen``. None for none.
    """

    draw: Callable[[Any, Array, Any, int], Any]
    value: Callable[[Any, Any, Any, Any, Array], tuple[Array, dict[str, Array]]]
    auxiliary: Auxiliary | None = None

    def __call__(
        self,
        params: Any,
        ema_params: Any,
        frozen: Any,
        batch: Any,
        key: Array,
        progress: Any,
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of a whole batch, and its metrics."""
        inputs = jax.tree.map(lambda leaf: leaf[0], self.draw(batch, key, progress, 1))
        key = jax.random.fold_in(key, 0)  # as of the first microbatch
        return self.value(params, ema_params, frozen, inputs, key)


def as_loss(function: Callable[..., Any]) -> Loss:
    """A plain function of the arguments of `Loss.__call__`, as a `Loss`.

    What it draws is its own affair; so it has no microbatches.
    """

    def draw(batch: Any, key: Array, progress: Any, microbatches: int) -> Any:
        if microbatches != 1:
            raise ValueError("a plain function cannot be taken in microbatches")
        return jax.tree.map(lambda leaf: leaf[None], (batch, key, progress))

    def value(
        params: Any, ema_params: Any, frozen: Any, inputs: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        return function(params, ema_params, frozen, *inputs)

    return Loss(draw, value)


def make_train_step(
    loss: Loss | Callable[..., tuple[Array, dict[str, Array]]],
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    num_steps: int,
    steps_per_dispatch: int = 1,
    microbatches: int = 1,
    skip_nonfinite: bool = False,
    state_sharding: Any = None,
    metrics_sharding: NamedSharding | None = None,
) -> Callable[[TrainState, Any, Any, Array], tuple[TrainState, dict[str, Array]]]:
    """Compiles ``train_step(state, frozen, batches, key)``: k updates in one dispatch.

    The state is donated. ``batches`` is None, or a tree with leading sizes ``[k, B]``.

    Args:
      loss: what is minimised; a plain function is taken as `as_loss` takes it.
      optimizer: that the state was created with.
      ema_decay: of the moving average.
      num_steps: of the run, for the losses that change on the way.
      steps_per_dispatch: ``k``.
      microbatches: the gradient is the mean over so many parts of the batch, taken one
        after the other in less memory.
      skip_nonfinite: leave the state as it was where an update is not finite, and count
        it.
      state_sharding: a `TrainState` of shardings.
      metrics_sharding: of all metrics; they are to be read by every process.

    Returns:
      A function that gives the new state and ``{name: [k, ...]}`` metrics: the loss and
      its parts, ``grad_norm``, and what `boot_jax.training.health` reads.
    """

    loss = loss if isinstance(loss, Loss) else as_loss(loss)

    def update(
        state: TrainState, frozen: Any, batch: Any, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(key, state.step)
        progress = state.step / num_steps
        inputs = loss.draw(batch, key, progress, microbatches)
        auxiliary, known, said = state.auxiliary, frozen, {}
        if loss.auxiliary is not None:
            auxiliary, said = loss.auxiliary.train(
                auxiliary,
                state.params,
                frozen,
                inputs,
                jax.random.fold_in(key, _AUXILIARY_STREAM),
                progress,
                microbatches,
            )
            known = frozen, auxiliary.params

        def of_one(index: Any, part: Any) -> Any:
            own_key = jax.random.fold_in(key, index)
            return jax.value_and_grad(loss.value, has_aux=True)(
                state.params, state.ema_params, known, part, own_key
            )

        (value, metrics), grads = mean_over_microbatches(of_one, inputs, microbatches)
        metrics |= said
        # Optax raises a float to the power of an integer count.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = state.replace(
            params=params,
            ema_params=update_ema(state.ema_params, params, state.step, ema_decay),
            opt_state=opt_state,
            auxiliary=auxiliary,
        )
        finite = {
            health.GRADIENTS: health.finite_groups(grads),
            health.PARAMETERS: health.finite_groups(params),
        }
        if skip_nonfinite:
            sound = jnp.isfinite(value) & jnp.all(jnp.stack([*finite.values()]))
            for part in jax.tree.leaves((auxiliary, said)):
                sound &= jnp.all(jnp.isfinite(part))
            new = jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, state)
            skipped = state.skipped + jnp.where(sound, 0, 1).astype(jnp.int32)
            new = new.replace(skipped=skipped)
            metrics |= {health.SKIPPED: skipped}
        metrics |= {"loss": value, "grad_norm": optax.tree.norm(grads)} | finite
        return new.replace(step=state.step + 1), metrics

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

    return jax.jit(
        train_step, donate_argnums=0, out_shardings=(state_sharding, metrics_sharding)
    )
