"""Teachers in diffusers format: a pipeline's folder, or its id on the hub.

Pipelines of a ``UNet2DModel`` or a ``DiTTransformer2DModel``, the latter with the
autoencoder that decodes its latents, and Stable Diffusion's and SDXL's, with what reads
their prompts. The folder decides everything about the teacher: network, schedule,
prediction type, thresholding and the spacing of its sampler's steps.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from boot_jax.models.text_unet import TextUNet
from boot_jax.models.transformer import Transformer
from boot_jax.models.unet import UNet
from boot_jax.models.vae import PREFIXES, VAEDecoder
from boot_jax.models.weights import WeightsError, from_diffusers, read_weights
from boot_jax.teachers import text as text_lib
from boot_jax.teachers.base import (
    Decoder,
    Teacher,
    TeacherError,
    TextEncoder,
    example_condition,
    network_denoiser,
)
from boot_jax.teachers.folder import Component, locate, read_components, read_index
from boot_jax.teachers.scheduler import read_scheduler

Network = UNet | TextUNet | Transformer

#: Networks that can teach, by their class in diffusers.
NETWORKS: dict[str, type[UNet] | type[TextUNet] | type[Transformer]] = {
    "UNet2DModel": UNet,
    "UNet2DConditionModel": TextUNet,
    "DiTTransformer2DModel": Transformer,
    "Transformer2DModel": Transformer,
}
#: Pipelines that draw from prompts alone; others with such a UNet want images, too.
TEXT_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
#: Parts that judge images or read some, which drawing from prompts does without.
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
_AUTOENCODER = "AutoencoderKL"


class Roles(NamedTuple):
    """The parts of a pipeline by what they do."""

    network: Component
    scheduler: Component
    autoencoder: Component | None
    text: dict[str, Component]


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
    folder = locate(path, revision)
    roles = roles_of(folder)
    network = build(roles.network, overrides)
    sample_shape = _sample_shape(network)
    num_classes, has_null_label = _labels(network, null_label)
    scheduler = read_scheduler(roles.scheduler.config)
    decoder, text = None, None
    if roles.autoencoder is not None:
        decoder = _decoder(roles.autoencoder, sample_shape)
    elif scheduler.to_image is not None:
        decoder = Decoder(
            decode=scheduler.to_image, params=None, image_shape=sample_shape
        )
    if isinstance(network, TextUNet):
        text = _text(
            folder, roles, network, (decoder.image_shape if decoder else sample_shape)
        )
    teacher = Teacher(
        denoise=network_denoiser(
            network, scheduler.schedule, scheduler.prediction_type
        ),
        params=None,
        schedule=scheduler.schedule,
        sample_shape=sample_shape,
        num_classes=num_classes,
        network=network,
        prediction_type=scheduler.prediction_type,
        has_null_label=has_null_label,
        thresholding=scheduler.thresholding,
        sampler_steps=scheduler.spacing,
        decoder=decoder,
        text=text,
    )
    return dataclasses.replace(teacher, params=_load(roles.network, teacher))


def roles_of(folder: pathlib.Path) -> Roles:
    """The parts of a pipeline's folder by their roles.

    Raises:
      TeacherError: a part is missing, or one is there that is not known.
    """
    networks, schedulers, autoencoders, text = [], [], [], {}
    parts = read_components(folder)
    for name, part in parts.items():
        if part.class_name in NETWORKS:
            networks.append(part)
        elif "Scheduler" in part.class_name:
            schedulers.append(part)
        elif part.class_name == _AUTOENCODER:
            autoencoders.append(part)
        elif name in text_lib.PARTS:
            text[name] = part
        elif name not in UNUSED_PARTS:
            raise TeacherError(
                f"the pipeline's {name} is a {part.class_name}, which is not "
                f"supported; supported are {', '.join(NETWORKS)} with a scheduler and "
                f"perhaps an {_AUTOENCODER} and what reads prompts"
            )
    if len(networks) != 1 or len(schedulers) != 1 or len(autoencoders) > 1:
        raise TeacherError(
            f"a pipeline must have one network ({', '.join(NETWORKS)}) and one "
            f"scheduler, but this one has {', '.join(parts) or 'no parts'}"
        )
    (network,) = networks
    if NETWORKS[network.class_name] is not TextUNet:
        for name, part in text.items():
            raise TeacherError(
                f"the pipeline's {name} is a {part.class_name}, but its network, a "
                f"{network.class_name}, takes no prompts"
            )
    return Roles(network, schedulers[0], next(iter(autoencoders), None), text)


def build(part: Component, overrides: Mapping[str, Any]) -> Network:
    """The network that a part's config describes; ``overrides`` are fields of it.

    Raises:
      TeacherError: the config is missing, or says what is not supported.
    """
    if not part.config:
        raise TeacherError(f"{part.folder} has no config.json")
    network = NETWORKS[part.class_name]
    config = _with_size(part.config) if network is TextUNet else part.config
    try:
        return network.from_config(config, **overrides)
    except (TypeError, ValueError) as error:
        raise TeacherError(f"{part.folder / 'config.json'}: {error}") from error


def _with_size(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Configs before diffusers 0.9 may name half the size; its pipelines take 64."""
    version = re.match(r"0\.(\d+)", str(config.get("_diffusers_version", "")))
    size = config.get("sample_size")
    if version and int(version[1]) < 9 and isinstance(size, int) and size < 64:
        return {**config, "sample_size": 64}
    return config


def _sample_shape(network: Network) -> tuple[int, int, int]:
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


def _labels(network: Network, null_label: bool) -> tuple[int | None, bool]:
    """The number of classes, and whether one more label means none."""
    if isinstance(network, Transformer):
        return network.num_embeds_ada_norm, True
    if isinstance(network, TextUNet):
        return None, False
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


def _text(
    folder: pathlib.Path, roles: Roles, network: TextUNet, image_shape: tuple[int, ...]
) -> TextEncoder:
    index = read_index(folder)
    name = str(index.get("_class_name")).removeprefix("Flax")
    if name not in TEXT_PIPELINES:
        raise TeacherError(
            f"{folder} is a {name}; of the pipelines with such a UNet, supported are "
            f"{' and '.join(TEXT_PIPELINES)}"
        )
    return text_lib.read_text_encoder(
        roles.text,
        network,
        (image_shape[0], image_shape[1]),
        empty_is_zero=bool(index.get("force_zeros_for_empty_prompt", False)),
        dtype=network.dtype,
    )


def _load(part: Component, teacher: Teacher) -> dict[str, Any]:
    """The weights of a teacher's network."""
    network = teacher.network
    assert network is not None
    image, time = jnp.zeros((1, *teacher.sample_shape)), jnp.zeros((1,))
    try:
        condition = example_condition(teacher)
        init = functools.partial(network.init, jax.random.key(0))
        template = jax.eval_shape(init, image, time, condition)["params"]
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise TeacherError(f"{part.folder / 'config.json'}: {reason}") from error
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
