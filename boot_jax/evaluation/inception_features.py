"""Features of FID: InceptionV3 with its published weights, over a mesh of devices."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from boot_jax.evaluation.features import (
    Description,
    FeatureError,
    ImageShape,
    check_images,
)
from boot_jax.evaluation.inception import SIZE, InceptionV3, inception_params
from boot_jax.evaluation.resizing import Resizer
from boot_jax.models.weights import WeightsError, read_tensors
from boot_jax.sharding import (
    batch_sharding,
    batch_shards,
    create_mesh,
    place,
    replicated,
    to_host,
)

#: What to do where there are no weights.
MISSING = (
    "set evaluation.weights to FID's InceptionV3 as safetensors, converted from "
    "pt_inception-2015-12-05-6726825d.pth of "
    "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights, or set "
    "evaluation.features='pixels', whose distance is not an FID"
)

# Images that a device describes at once: 299x299 pixels each, whatever their own size.
_PER_DEVICE = 32


def file_hash(path: Path) -> str:
    """The first 12 hexadecimal digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


class InceptionFeatures:
    """Describes images by InceptionV3; see `boot_jax.evaluation.inception`.

    A batch is split over the mesh, and what an image's features are depends neither on
    the batch nor on the number of devices, but for the rounding of float32.
    """

    def __init__(
        self,
        params: Any,
        *,
        image_shape: ImageShape,
        resizer: Resizer,
        weights_name: str,
        mesh: Mesh | None = None,
    ) -> None:
        """Most are made with `from_file`.

        Args:
          params: of `boot_jax.evaluation.inception.InceptionV3`.
          image_shape: ``(H, W, C)``, C being 1 or 3.
          resizer: to 299x299.
          weights_name: says which parameters these are.
          mesh: of devices; None for all of them.

        Raises:
          FeatureError: images that are neither grey nor RGB.
        """
        if image_shape[2] not in (1, 3):
            raise FeatureError(
                f"InceptionV3 reads images of 1 or 3 channels, but these have "
                f"{image_shape[2]}; set evaluation.features='pixels'"
            )
        self.image_shape = image_shape
        self._name = f"InceptionV3 pool3 2048 (weights {weights_name}, {resizer.name})"
        self._mesh = mesh or create_mesh()
        self._params = place(params, replicated(self._mesh))
        sharding = batch_sharding(self._mesh)
        network = InceptionV3()

        def describe(params: Any, images: jax.Array) -> Any:
            return network.apply({"params": params}, resizer(images))

        self._describe = jax.jit(describe, out_shardings=sharding)

    @classmethod
    def from_file(
        cls,
        path: str,
        *,
        image_shape: ImageShape,
        resize: str = "clean",
        round_uint8: bool = True,
        mesh: Mesh | None = None,
    ) -> "InceptionFeatures":
        """Reads the weights; see `boot_jax.models.weights.read_tensors`.

        Raises:
          FeatureError: there is no such file; the message says where people get it.
          WeightsError: it cannot be read, or holds another network's weights.
        """
        file = Path(path).expanduser()
        if not path or not file.exists():
            lack = f"there is no file {file}" if path else "evaluation.weights is empty"
            raise FeatureError(f"{lack}; {MISSING}")
        try:
            params = inception_params(read_tensors(file))
        except WeightsError as error:
            raise WeightsError(f"evaluation.weights: {error}") from error
        return cls(
            params,
            image_shape=image_shape,
            resizer=Resizer(mode=resize, size=SIZE, round_uint8=round_uint8),
            weights_name=file_hash(file),
            mesh=mesh,
        )

    @property
    def name(self) -> str:
        """Network, hash of the weights' file, resizing and rounding."""
        return self._name

    @property
    def distance_name(self) -> str:
        """FID."""
        return "FID"

    def describe(self, images: ArrayLike) -> Description:
        """Describes ``[N, H, W, C]`` floats in [-1, 1], in float32.

        Raises:
          ValueError: another image shape, or integers.
        """
        given = check_images(images, self.image_shape).astype(np.float32)
        unit = batch_shards(self._mesh)
        size = unit * min(_PER_DEVICE, -(-len(given) // unit))
        parts = []
        for start in range(0, len(given), size):
            batch = given[start : start + size]
            # The last batch is filled up and cut, so that there is one compilation.
            missing = np.zeros((size - len(batch), *self.image_shape), np.float32)
            whole = np.concatenate([batch, missing])
            placed = place(whole, batch_sharding(self._mesh))
            made = to_host(self._describe(self._params, placed))
            parts.append([part[: len(batch)] for part in made])
        pooled, spatial, logits = map(np.concatenate, zip(*parts, strict=True))
        return Description(pooled, spatial, logits)
