"""Networks: Flax Linen, NHWC, driven by configs.

All are called as ``network(x, time, condition, added)``: noisy images ``[B, H, W, C]``,
the network's own time ``[B]``, a condition (``{"label": [B]}``, ``{"tokens": [B, L]}``
or None) and further scalars ``{name: [B]}`` whose embeddings are added, for the names
in the module's field ``added_embeddings``. They return ``[B, H, W, C]`` float32.
"""

from typing import Any

import flax.linen as nn

from boot_jax.models.dit import DiT
from boot_jax.models.text_unet import TextUNet
from boot_jax.models.unet import UNet


def create_network(
    name: str,
    *,
    sample_shape: tuple[int, int, int],
    num_classes: int | None = None,
    vocab_size: int | None = None,
    text_length: int = 0,
    **options: Any,
) -> nn.Module:
    """A network by name, for images of one shape.

    Args:
      name: ``dit`` or ``unet``.
      sample_shape: ``(H, W, C)``.
      num_classes: labels; one more, the null label, is added. None for none.
      vocab_size: word ids, of texts of ``text_length`` words; None for none.
      text_length: words in a row.
      **options: fields of `DiT`, or of a diffusers ``UNet2DModel`` config.

    Raises:
      ValueError: unknown name or option, or an option that is not supported.
    """
    height, width, channels = sample_shape
    if name == "dit":
        text = {"vocab_size": vocab_size, "text_length": text_length}
        classes = {"num_classes": num_classes}
        try:
            return DiT(out_channels=channels, **classes, **text, **options)
        except TypeError as error:
            raise ValueError(f"the dit has no such option: {error}") from error
    if name == "unet":
        if vocab_size is not None:
            raise ValueError("this unet reads no text; choose dit")
        sizes = {"in_channels": channels, "out_channels": channels}
        null_label = None if num_classes is None else num_classes + 1
        config = sizes | {"num_class_embeds": null_label} | options
        size = height if height == width else (height, width)
        return UNet.from_config({"sample_size": size} | config)
    raise ValueError(f"network {name!r} is not known; choose dit or unet")


def is_convolutional(network: nn.Module) -> bool:
    """Whether a network is one of the UNets."""
    return isinstance(network, (UNet, TextUNet))
