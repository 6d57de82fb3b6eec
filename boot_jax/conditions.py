"""What a batch is conditioned on, drawn on the device from a key, or read: prompts.

A condition is ``None`` or a dict of arrays with leading size ``B``: ``label [B]
int32``, or what a text encoder gives; ``guidance_scale [B]`` where the student is told
the scale of its teacher's guidance; and ``negative``, of the unconditional half, where
that is not the same for all.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boot_jax.guidance import NEGATIVE_KEY, SCALE_KEY, draw_guidance_scale
from boot_jax.teachers.base import TextEncoder

#: Where a batch of prompts carries its tokens, and what marks those of the negatives.
TOKENS, NEGATIVE = "tokens", "negative_"


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Draws the conditions of data-free batches.

    Attributes:
      num_classes: labels are uniform in ``0 ... num_classes - 1``; None for none.
      guidance_range: ``(w_min, w_max)`` of drawn guidance scales; None for none drawn.
    """

    num_classes: int | None = None
    guidance_range: tuple[float, float] | None = None

    def draw(self, key: Array, batch_size: int, prompts: Any = None) -> Any:
        """The condition of one batch; a function of the key and of its prompts.

        ``prompts`` is what `boot_jax.prompts` reads, ``{name: [B, ...]}``; None for
        none.
        """
        label_key, scale_key = jax.random.split(key)
        if prompts is not None:
            return self._with_scale(dict(prompts), scale_key, batch_size)
        if self.num_classes is None:
            return None
        label = jax.random.randint(label_key, (batch_size,), 0, self.num_classes)
        return self.of_labels(label, scale_key)

    def of_labels(self, label: Array, key: Array) -> dict[str, Array]:
        """The condition of given labels, ``[B] int32``."""
        condition = {"label": label.astype(jnp.int32)}
        return self._with_scale(condition, key, label.shape[0])

    def _with_scale(self, condition: Any, key: Array, batch_size: int) -> Any:
        if self.guidance_range is not None:
            low, high = self.guidance_range
            condition[SCALE_KEY] = draw_guidance_scale(key, batch_size, low, high)
        return condition

    def null(self) -> Any:
        """The unconditional condition, leading size 1: the label after the last."""
        if self.num_classes is None:
            return None
        return {"label": jnp.full((1,), self.num_classes, jnp.int32)}


#: ``(params, what was read) -> condition``.
Encode = Callable[[Any, Any], Any]


def prompt_encoder(text: TextEncoder, negative: str | None) -> Encode:
    """What turns prompts as they are read into the condition of both networks.

    Args:
      text: the teacher's; its parameters are the first argument of what is given.
      negative: the prompt of the unconditional half of those batches that bring none of
        their own; None where there is no guidance, and so no such half.

    Returns:
      ``(params, {"tokens": [B, ...], ...}) -> condition``. Names that begin with
      ``negative_`` are of the unconditional half; what is neither is left as it is, as
      embeddings are that were made before.
    """
    negative_tokens = None
    if negative is not None:
        negative_tokens = np.asarray(text.tokenizer([negative]).ids)

    def encode(params: Any, read: Any) -> Any:
        condition, own = {}, {}
        for name, leaf in read.items():
            (own if name.startswith(NEGATIVE) else condition)[name] = leaf
        own = {name.removeprefix(NEGATIVE): leaf for name, leaf in own.items()}
        condition = _encoded(text, params, condition)
        if negative_tokens is None:
            return condition
        if own:
            return condition | {NEGATIVE_KEY: _encoded(text, params, own)}
        null = text.encode(params, jnp.asarray(negative_tokens))
        null = {
            name: jnp.broadcast_to(leaf, condition[name].shape)
            for name, leaf in null.items()
        }
        return condition | {NEGATIVE_KEY: null}

    return encode


def _encoded(text: TextEncoder, params: Any, entries: dict[str, Array]) -> Any:
    if TOKENS not in entries:
        return entries
    rest = {name: leaf for name, leaf in entries.items() if name != TOKENS}
    return rest | text.encode(params, entries[TOKENS])
