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
    """What turns tokens as they are read into the condition of both networks.

    Args:
      text: the teacher's; its parameters are the first argument of what is given.
      negative: the prompt of the unconditional half of those batches that bring none of
        their own; None where there is no guidance, and so no such half.

    Returns:
      ``(params, {"tokens": [B, ...], ...}) -> condition``. Other entries, such as
      ``guidance_scale``, are left as they are; ``negative_tokens`` are of the
      unconditional half.
    """
    tokens = None if negative is None else np.asarray(text.tokenizer([negative]).ids)

    def encode(params: Any, read: Any) -> Any:
        kept = {k: v for k, v in read.items() if k not in (TOKENS, NEGATIVE + TOKENS)}
        condition = text.encode(params, read[TOKENS])
        if tokens is None:
            return kept | condition
        own = read.get(NEGATIVE + TOKENS)
        null = text.encode(params, jnp.asarray(tokens) if own is None else own)
        return kept | condition | {NEGATIVE_KEY: _broadcast(null, condition)}

    return encode


def embedding_reader(guided: bool) -> Encode:
    """The same for embeddings that were made before.

    The parameters are those of the negative prompt then, ``{name: [1, ...]}``, for
    batches that bring none of their own under ``negative_`` and the name.
    """

    def read_embeddings(params: Any, read: Any) -> Any:
        condition = {k: v for k, v in read.items() if not k.startswith(NEGATIVE)}
        if not guided:
            return condition
        own = {
            k.removeprefix(NEGATIVE): v for k, v in read.items() if k not in condition
        }
        null = own or params
        like = {name: condition[name] for name in null}
        return condition | {NEGATIVE_KEY: _broadcast(null, like)}

    return read_embeddings


def _broadcast(tree: Any, like: Any) -> Any:
    return jax.tree.map(
        lambda leaf, other: jnp.broadcast_to(leaf.astype(other.dtype), other.shape),
        tree,
        like,
    )
