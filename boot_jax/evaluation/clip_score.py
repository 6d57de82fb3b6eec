"""The CLIP score: how well images match their prompts.

Hessel et al. 2021, *CLIPScore*, arXiv 2104.08718: the cosine between CLIP's embeddings
of image and text, no less than 0; here times 100, as papers on text-to-image models
have it (Hessel et al. multiply by 2.5). It depends on the model, which is named.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray
from PIL import Image

from boot_jax.evaluation.features import FeatureError
from boot_jax.evaluation.plots import to_uint8
from boot_jax.jsons import read_object
from boot_jax.models import clip, clip_vision
from boot_jax.models.clip import CLIPTextEncoder
from boot_jax.models.clip_vision import CLIPVisionEncoder
from boot_jax.models.weights import from_diffusers, read_weights
from boot_jax.sharding import (
    batch_sharding,
    batch_shards,
    create_mesh,
    place,
    replicated,
    to_host,
)
from boot_jax.tokenizers import ClipTokenizer

# Of a folder without preprocessor_config.json: those of OpenAI's models.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)

_UNUSED = ("logit_scale", *clip.UNUSED, *clip_vision.UNUSED)
_TEXT = ("text_model", "text_projection")


class Preprocessor(NamedTuple):
    """What CLIP's images go through: resized, cropped and normalised.

    Attributes:
      resize: the shorter edge, in pixels, by Pillow's bicubic filter on uint8.
      crop: the edge of the centred square that is left.
      mean, std: of each channel, of values in [0, 1].
    """

    resize: int
    crop: int
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD

    @classmethod
    def from_folder(cls, folder: Path, image_size: int) -> "Preprocessor":
        """Of ``preprocessor_config.json``, if there is one."""
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            return cls(image_size, image_size)
        config = read_object(path, FeatureError)
        size, crop = config.get("size", image_size), config.get("crop_size", image_size)
        if isinstance(size, dict):
            size = size.get("shortest_edge", size.get("height"))
        if isinstance(crop, dict):
            crop = crop.get("height")
        mean, std = config.get("image_mean", _MEAN), config.get("image_std", _STD)
        if not isinstance(size, int) or not isinstance(crop, int) or crop != image_size:
            raise FeatureError(
                f"{path} crops images to {crop}, but the network reads {image_size} "
                "pixels; fetch the folder again"
            )
        return cls(size, crop, tuple(mean), tuple(std))

    def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Maps ``[N, H, W, C]`` in [-1, 1], grey or RGB, to ``[N, crop, crop, 3]``."""
        pixels = to_uint8(images)
        pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
        prepared = np.stack([self._one(Image.fromarray(image)) for image in pixels])
        scaled = prepared.astype(np.float32) / 255.0 - np.asarray(self.mean, np.float32)
        return scaled / np.asarray(self.std, np.float32)

    def _one(self, image: Image.Image) -> NDArray[np.uint8]:
        shorter = min(image.size)
        width, height = (self.resize * edge // shorter for edge in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.crop) // 2, (height - self.crop) // 2
        return np.asarray(
            image.crop((left, top, left + self.crop, top + self.crop)), np.uint8
        )


class ClipScorer:
    """Scores images against prompts, by a CLIP model's folder."""

    def __init__(
        self,
        text: CLIPTextEncoder,
        vision: CLIPVisionEncoder,
        params: dict[str, Any],
        tokenizer: ClipTokenizer,
        preprocessor: Preprocessor,
        name: str,
        mesh: Mesh | None = None,
    ) -> None:
        """Most are made with `from_folder`; ``params`` has "text" and "vision"."""
        self.name = name
        self._mesh = mesh or create_mesh()
        self._params = place(params, replicated(self._mesh))
        self._tokenizer, self._preprocessor = tokenizer, preprocessor

        def cosines(params: Any, tokens: Array, images: Array) -> Array:
            encoded: Any = text.apply({"params": params["text"]}, tokens)
            encoded_images: Any = vision.apply({"params": params["vision"]}, images)
            words, seen = encoded.text_embeds, encoded_images.image_embeds
            lengths = jnp.linalg.norm(words, axis=-1) * jnp.linalg.norm(seen, axis=-1)
            return jnp.sum(words * seen, axis=-1) / lengths

        self._cosines = jax.jit(cosines, out_shardings=batch_sharding(self._mesh))

    @classmethod
    def from_folder(cls, path: str, mesh: Mesh | None = None) -> "ClipScorer":
        """Reads config, weights, tokenizer and preprocessor of a ``CLIPModel``.

        Raises:
          FeatureError: there is no such folder, or it is another model's.
          WeightsError, TokenizerError: a part is missing or damaged.
        """
        folder = Path(path).expanduser()
        if not (folder / "config.json").is_file():
            raise FeatureError(
                f"evaluation.clip: {folder} holds no config.json; give the folder of a "
                "CLIPModel, such as a download of openai/clip-vit-base-patch16"
            )
        config = read_object(folder / "config.json", FeatureError)
        if config.get("model_type") != "clip":
            raise FeatureError(
                f"evaluation.clip: {folder} is a {config.get('model_type')!r}, but a "
                "'clip' model is needed, with both of its encoders"
            )
        dim = {"projection_dim": config.get("projection_dim", 512)}
        try:
            text = CLIPTextEncoder.from_config(
                config.get("text_config") or {}, with_projection=True, **dim
            )
            vision = CLIPVisionEncoder.from_config(
                config.get("vision_config") or {}, **dim
            )
        except ValueError as error:
            raise FeatureError(f"evaluation.clip: {folder}: {error}") from error
        size = vision.image_size
        tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        images = jax.ShapeDtypeStruct((1, size, size, vision.num_channels), jnp.float32)
        tensors = read_weights(folder)
        texts = {k: v for k, v in tensors.items() if k.startswith(_TEXT)}
        others = {k: v for k, v in tensors.items() if k not in texts}

        def filled(network: Any, example: Any, given: dict[str, Any]) -> Any:
            template = jax.eval_shape(network.init, jax.random.key(0), example)
            return from_diffusers(given, template["params"], ignore=_UNUSED)

        return cls(
            text,
            vision,
            {
                "text": filled(text, tokens, texts),
                "vision": filled(vision, images, others),
            },
            ClipTokenizer.from_folder(folder),
            Preprocessor.from_folder(folder, size),
            f"CLIP {folder.name} ({vision.num_hidden_layers} layers of "
            f"{vision.hidden_size}, patches of {vision.patch_size} pixels)",
            mesh,
        )

    def __call__(
        self, images: NDArray[Any], prompts: Sequence[str]
    ) -> NDArray[np.float64]:
        """The score of each image with its prompt, ``[N]``, in 0 to 100.

        Args:
          images: ``[N, H, W, C]`` in [-1, 1], C being 1 or 3.
          prompts: one for each; what is longer than CLIP's texts is cut.
        """
        count, unit = len(images), batch_shards(self._mesh)
        filled = np.minimum(np.arange(-(-count // unit) * unit), count - 1)
        tokens = self._tokenizer(prompts).ids[filled]
        prepared = self._preprocessor(images)[filled]
        placed = place((tokens, prepared), batch_sharding(self._mesh))
        found = to_host(self._cosines(self._params, *placed))[:count]
        return 100.0 * np.maximum(found.astype(np.float64), 0.0)
