"""Teachers in diffusers format: a pipeline's folder, or its id on the hub.

Pipelines of a ``UNet2DModel`` or a ``DiTTransformer2DModel``, the latter with the
autoencoder that decodes its latents. The folder decides everything about the teacher:
network, schedule, prediction type, thresholding and the spacing of its sampler's steps.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from boot_jax.models.transformer import Transformer
from boot_jax.models.unet import UNet
from boot_jax.models.vae import PREFIXES, VAEDecoder
from boot_jax.models.weights import WeightsError, from_diffusers, read_weights
from boot_jax.teachers.base import Decoder, Teacher, TeacherError, network_denoiser
from boot_jax.teachers.checkpoint import initialiser
from boot_jax.teachers.folder import Component, locate, read_components
from boot_jax.teachers.scheduler import read_scheduler

#: Networks that can teach, by their class in diffusers.
NETWORKS: dict[str, type[UNet] | type[Transformer]] = {
    "UNet2DModel": UNet,
    "DiTTransformer2DModel": Transformer,
    "Transformer2DModel": Transformer,
}
_AUTOENCODER = "AutoencoderKL"


def load_teacher(
    path: str, *, revision: str = "", null_label: bool = False, **overrides: Any
) -> Teacher:
    """Reads a teacher from a pipeline in diffusers format.

    Args:
      path: a folder, or a hub id ``OWNER/NAME``.
      revision: of the hub id; empty for its newest.
      null_label: whether the last class of a UNet means none; a DiT always has one.
      **overrides: fields of the network, such as ``dtype`` or ``remat``.

    Raises:
      TeacherError: the folder is missing or damaged, or holds what is not supported.
      WeightsError: its weights cannot be read or do not fit its network; names each
        missing, unexpected and mis-shaped tensor.
    """
    parts = read_components(locate(path, revision))
    network_part, scheduler_part, autoencoder_part = _roles(parts)
    network = _build(network_part, overrides)
    sample_shape = _sample_shape(network)
    num_classes, has_null_label = _labels(network, null_label)
    scheduler = read_scheduler(scheduler_part.config)
    params = _load(network_part, network, sample_shape, num_classes)
    decoder = None
    if autoencoder_part is not None:
        decoder = _decoder(autoencoder_part, sample_shape)
    elif scheduler.to_image is not None:
        decoder = Decoder(
            decode=scheduler.to_image, params=None, image_shape=sample_shape
        )
    return Teacher(
        denoise=network_denoiser(
            network, scheduler.schedule, scheduler.prediction_type
        ),
        params=params,
        schedule=scheduler.schedule,
        sample_shape=sample_shape,
        num_classes=num_classes,
        network=network,
        prediction_type=scheduler.prediction_type,
        has_null_label=has_null_label,
        thresholding=scheduler.thresholding,
        sampler_steps=scheduler.spacing,
        decoder=decoder,
    )


def _roles(
    parts: Mapping[str, Component],
) -> tuple[Component, Component, Component | None]:
    """Network, scheduler, and the autoencoder if there is one."""
    networks, schedulers, autoencoders = [], [], []
    for name, part in parts.items():
        if part.class_name in NETWORKS:
            networks.append(part)
        elif "Scheduler" in part.class_name:
            schedulers.append(part)
        elif part.class_name == _AUTOENCODER:
            autoencoders.append(part)
        else:
            raise TeacherError(
                f"the pipeline's {name} is a {part.class_name}, which is not "
                f"supported; supported are {', '.join(NETWORKS)} with a scheduler and "
                f"perhaps an {_AUTOENCODER}"
            )
    if len(networks) != 1 or len(schedulers) != 1 or len(autoencoders) > 1:
        raise TeacherError(
            f"a pipeline must have one network ({', '.join(NETWORKS)}) and one "
            f"scheduler, but this one has {', '.join(parts) or 'no parts'}"
        )
    return networks[0], schedulers[0], next(iter(autoencoders), None)


def _build(part: Component, overrides: Mapping[str, Any]) -> UNet | Transformer:
    if not part.config:
        raise TeacherError(f"{part.folder} has no config.json")
    try:
        return NETWORKS[part.class_name].from_config(part.config, **overrides)
    except (TypeError, ValueError) as error:
        raise TeacherError(f"{part.folder / 'config.json'}: {error}") from error


def _sample_shape(network: UNet | Transformer) -> tuple[int, int, int]:
    size, channels = network.sample_size, network.in_channels
    if size is None:
        raise TeacherError(
            "the network's config.json has no sample_size; write the images' side there"
        )
    height, width = (size, size) if isinstance(size, int) else size
    if (network.out_channels or channels) not in (channels, 2 * channels):
        raise TeacherError(
            f"the network gives {network.out_channels} channels for {channels}; as "
            "many are supported, or twice that for a learned variance"
        )
    return height, width, channels


def _labels(network: UNet | Transformer, null_label: bool) -> tuple[int | None, bool]:
    """The number of classes, and whether one more label means none."""
    if isinstance(network, Transformer):
        return network.num_embeds_ada_norm, True
    if network.class_embed_type is not None:
        raise TeacherError(
            f"class_embed_type={network.class_embed_type!r} does not say which classes "
            "there are; only labels of num_class_embeds classes are supported"
        )
    classes = network.num_class_embeds
    if not null_label:
        return classes, False
    if classes is None or classes < 2:
        raise TeacherError(
            "teacher.null_label is set, but the network has no classes of which the "
            "last could mean none"
        )
    return classes - 1, True


def _load(
    part: Component,
    network: nn.Module,
    sample_shape: tuple[int, int, int],
    num_classes: int | None,
) -> dict[str, Any]:
    init = initialiser(network, sample_shape, num_classes)
    try:
        template = jax.eval_shape(init, jax.random.key(0))
    except ValueError as error:
        raise TeacherError(f"{part.folder / 'config.json'}: {error}") from error
    return _fill(part, read_weights(part.folder), template)


def _fill(
    part: Component, tensors: Mapping[str, Any], template: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        return from_diffusers(tensors, template)
    except WeightsError as error:
        raise WeightsError(f"{part.folder}: {error}") from error


def _decoder(part: Component, sample_shape: tuple[int, int, int]) -> Decoder:
    """The decoder of an autoencoder; its encoder is not looked at."""
    try:
        network = VAEDecoder.from_config(part.config)
        latents = jnp.zeros((1, *sample_shape))
        shapes = jax.eval_shape(network.init, jax.random.key(0), latents)
    except (TypeError, ValueError) as error:
        raise TeacherError(f"{part.folder / 'config.json'}: {error}") from error
    height, width, channels = sample_shape
    if channels != network.latent_channels:
        raise TeacherError(
            f"{part.folder} decodes {network.latent_channels} channels, but the "
            f"network makes {channels}"
        )
    tensors = {
        name: tensor
        for name, tensor in read_weights(part.folder).items()
        if name.startswith(PREFIXES)
    }
    params = _fill(part, tensors, shapes["params"])
    scale = network.scale
    return Decoder(
        decode=functools.partial(_decode, network),
        params=params,
        image_shape=(scale * height, scale * width, network.out_channels),
    )


@functools.partial(jax.jit, static_argnums=0)
def _decode(network: VAEDecoder, params: Any, latents: Array) -> Array:
    images = network.apply({"params": params}, latents)
    assert isinstance(images, Array)
    return jnp.clip(images, -1, 1)
