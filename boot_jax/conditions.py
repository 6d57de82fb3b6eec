"""What a batch is conditioned on, drawn on the device from a key.

A condition is ``None`` or a dict of arrays with leading size ``B``: ``label [B]
int32``, and ``guidance_scale [B]`` where the student is told the scale of its teacher's
guidance.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from boot_jax.guidance import SCALE_KEY, draw_guidance_scale


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Draws the conditions of data-free batches.

    Attributes:
      num_classes: labels are uniform in ``0 ... num_classes - 1``; None for none.
      guidance_range: ``(w_min, w_max)`` of drawn guidance scales; None for none drawn.
    """

    num_classes: int | None = None
    guidance_range: tuple[float, float] | None = None

    def draw(self, key: Array, batch_size: int) -> Any:
        """The condition of one batch; a function of the key alone."""
        if self.num_classes is None:
            return None
        label_key, scale_key = jax.random.split(key)
        label = jax.random.randint(label_key, (batch_size,), 0, self.num_classes)
        return self.of_labels(label, scale_key)

    def of_labels(self, label: Array, key: Array) -> dict[str, Array]:
        """The condition of given labels, ``[B] int32``."""
        condition = {"label": label.astype(jnp.int32)}
        if self.guidance_range is not None:
            low, high = self.guidance_range
            condition[SCALE_KEY] = draw_guidance_scale(key, label.shape[0], low, high)
        return condition

    def null(self) -> Any:
        """The unconditional condition, leading size 1: the label after the last."""
        if self.num_classes is None:
            return None
        return {"label": jnp.full((1,), self.num_classes, jnp.int32)}
