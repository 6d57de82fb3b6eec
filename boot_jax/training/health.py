"""Whether the numbers of a run are sound: what is not finite, and loss spikes."""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boot_jax.sharding import path_name

#: In the metrics of a step: whether each tensor group is finite, ``[groups]`` bool.
GRADIENTS, PARAMETERS = "finite/gradients", "finite/parameters"
#: In the metrics of a step: how many steps the run has skipped so far.
SKIPPED = "skipped"

_WINDOW, _SHORTEST_WINDOW = 100, 20


def group_names(params: Any) -> list[str]:
    """The tensor groups of a network: the first level of its parameters."""
    return sorted(_groups(params))


def finite_groups(tree: Any) -> Array:
    """Whether all numbers of each group are finite, ``[groups]`` bool."""
    groups = _groups(tree)
    flags = [
        jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in groups[name]]))
        for name in group_names(tree)
    ]
    return jnp.stack(flags)


def _groups(tree: Any) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        groups.setdefault(path_name(path[:1]), []).append(leaf)
    return groups


class Health:
    """Examines the metrics of finished steps, in order.

    Args:
      groups: the names behind `GRADIENTS` and `PARAMETERS`.
      most_skipped: how many steps the run may have skipped; the next one stops it.
      spike_factor: a loss over this many times the median of the last 100 is a spike;
        0 for none.
      record: told of every skipped step and spike: ``record(event, **fields)``.
    """

    def __init__(
        self,
        groups: list[str],
        *,
        most_skipped: int = 0,
        spike_factor: float = 0.0,
        record: Callable[..., None] = lambda event, **fields: None,
    ) -> None:
        self._groups, self._most_skipped = groups, most_skipped
        self._spike_factor, self._record = spike_factor, record
        self._losses: collections.deque[float] = collections.deque(maxlen=_WINDOW)

    def examine(self, values: dict[str, np.ndarray], first_step: int) -> np.ndarray:
        """Takes the metrics ``{name: [k, ...]}`` of the steps after ``first_step``.

        Takes `GRADIENTS` and `PARAMETERS` out of the metrics.

        Returns:
          Which of the steps count, ``[k]`` bool: those that were not skipped.

        Raises:
          FloatingPointError: a step was not finite, and there was none left to skip;
            names the step, the metrics and the tensor groups.
        """
        unsound = {name: values.pop(name, None) for name in (GRADIENTS, PARAMETERS)}
        count = len(next(iter(values.values())))
        good = np.ones(count, bool)
        for index in range(count):
            names = [f"{n} = {v[index]}" for n, v in values.items() if n != SKIPPED]
            bad = [n for n in names if not np.isfinite(float(n.split(" = ")[1]))]
            groups = self._guilty(unsound, index)
            step = first_step + index + 1
            if not bad and not groups:
                self._watch_loss(step, float(values["loss"][index]))
                continue
            skipped = int(values[SKIPPED][index]) if SKIPPED in values else 0
            if skipped > self._most_skipped or not self._most_skipped:
                raise FloatingPointError(
                    _message(step, bad, groups, self._most_skipped)
                )
            good[index] = False
            self._record("skipped_step", step=step, why=[*bad, *groups], total=skipped)
        return good

    def _guilty(
        self, unsound: Mapping[str, np.ndarray | None], index: int
    ) -> list[str]:
        words = []
        for name, flags in unsound.items():
            if flags is not None and not flags[index].all():
                bad = [self._groups[i] for i in np.flatnonzero(~flags[index])]
                words.append(f"{name.split('/')[1]} of {', '.join(bad)}")
        return words

    def _watch_loss(self, step: int, loss: float) -> None:
        if self._spike_factor and len(self._losses) >= _SHORTEST_WINDOW:
            median = float(np.median(self._losses))
            if loss > self._spike_factor * median:
                self._record("loss_spike", step=step, loss=loss, median=median)
        self._losses.append(loss)


def _message(step: int, bad: list[str], groups: list[str], most_skipped: int) -> str:
    what = [", ".join(bad)] * bool(bad)
    what += [f"not finite: {'; '.join(groups)}"] * bool(groups)
    limit = f" {most_skipped} such steps were skipped before." if most_skipped else ""
    return (
        f"step {step}: {'; '.join(what)}.{limit} The run stopped; its "
        "checkpoints are from before. A lower learning rate or a longer warm-up may "
        "help, or skip_nonfinite beside the learning rate, to skip a few such steps"
    )
