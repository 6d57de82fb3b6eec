"""The only loop; both trainings use it."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array

from boot_jax.interruption import Interruption, Preempted, Watchdog
from boot_jax.training.checkpoints import Checkpoints
from boot_jax.training.logs import Logger
from boot_jax.training.state import TrainState

# A save may take so many times as long as a step before it counts as hung.
_PATIENCE_WITH_DISKS = 4.0
# So may a grid or a check, the first of which compiles and runs the teacher's sampler.
_PATIENCE_WITH_HOOKS = 4.0


class Hook(NamedTuple):
    """Something to do on the way.

    Attributes:
      name: of what it makes, for whoever waits for it.
      every: steps between calls.
      call: told the step and the moving average; None for nothing.
    """

    name: str
    every: int
    call: Callable[[int, Any], None] | None


def fit(
    state: TrainState,
    train_step: Callable[..., tuple[TrainState, dict[str, Array]]],
    *,
    frozen: Any,
    batches: Iterator[Any] | None,
    key: Array,
    num_steps: int,
    steps_per_dispatch: int,
    checkpoint_every: int,
    checkpoints: Checkpoints,
    logger: Logger,
    interruption: Interruption,
    watchdog: Watchdog,
    hooks: Sequence[Hook] = (),
) -> TrainState:
    """Runs ``train_step`` until ``num_steps``, saving and logging on the way.

    The metrics of a dispatch are read after the next one is under way, so that the
    device never waits for the host; a state is saved only once they are known to be
    finite. A save that failed in the background is made again at the next step.

    Args:
      state: where to start; donated.
      train_step: of `boot_jax.training.step.make_train_step`.
      frozen: its second argument.
      batches: its third argument for each dispatch in turn; None for None.
      key: its fourth argument.
      num_steps, steps_per_dispatch, checkpoint_every: in steps, the first two and the
        start multiples of the second.
      checkpoints, logger: where to save and what to tell.
      interruption: asked after every dispatch.
      watchdog: told of every dispatch.
      hooks: what else to do on the way; each one's ``every`` a multiple of
        ``steps_per_dispatch``.

    Returns:
      The last state, saved.

    Raises:
      FloatingPointError: a loss or gradient is not finite.
      CheckpointError: nothing can be saved.
      Preempted: the run was asked to stop, and the state is saved.
    """
    pending: tuple[int, dict[str, Array]] | None = None
    with interruption.protected(), watchdog:
        for start in range(int(state.step), num_steps, steps_per_dispatch):
            end = start + steps_per_dispatch
            watchdog.beat(f"step {end}")
            batch = None if batches is None else next(batches)
            state, metrics = train_step(state, frozen, batch, key)
            if pending is not None:
                logger.write(*pending)
            pending = end, metrics
            stop = interruption.poll()
            due = end % checkpoint_every == 0 or end == num_steps
            if stop or due or checkpoints.must_retry():
                logger.write(*pending)
                pending = None
                watchdog.beat(f"saving step {end}", _PATIENCE_WITH_DISKS)
                checkpoints.save(state)
            if stop:
                checkpoints.finish(state)
                raise Preempted(f"saved step {end} of {num_steps}")
            for name, every, call in hooks:
                if call is not None and end % every == 0:
                    watchdog.beat(f"the {name} of step {end}", _PATIENCE_WITH_HOOKS)
                    call(end, state.ema_params)
        watchdog.beat("the last save", _PATIENCE_WITH_DISKS)
        checkpoints.finish(state)
    return state


def dispatch_length(wanted: int, *counts: int) -> int:
    """The steps in a dispatch: the largest up to ``wanted`` that divides all counts.

    Args:
      wanted: the most steps in one dispatch.
      *counts: the length of the run, its start, and the steps between checkpoints.

    >>> dispatch_length(30, 4000, 1000, 0)
    25
    """
    common = math.gcd(*counts)
    most = min(wanted, common)
    return next(length for length in range(most, 0, -1) if common % length == 0)


def default_dispatch(convolutional: bool) -> int:
    """The steps per dispatch that suit the backend: enough to hide the host's work.

    But on CPU, XLA runs a convolution inside a loop on one thread, several times
    slower.
    """
    return 1 if convolutional and jax.default_backend() == "cpu" else 20
