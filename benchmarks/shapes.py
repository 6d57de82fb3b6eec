"""Whether what is painted is what was asked for: scores runs of configs/shapes.py.

python benchmarks/shapes.py WORKDIR [WORKDIR ...]

Accuracy is the share of held-out seeds, each with a caption of its own, whose image
shows colour and shape of that caption; diversity is the mean distance between images of
one caption, over that of the data set (`boot_jax.shapes`).
"""

import argparse
import json
import pathlib

import ml_collections
import numpy as np
from PIL import Image

from boot_jax import sampling, shapes, sharding
from boot_jax.run import Run
from boot_jax.trained import trained_pair

TEACHER_STEPS = 50
IMAGES_OF_ONE = 10  # of each shortest caption, for the diversity


def scores(run: Run, num_seeds: int = 200, seed: int = 77) -> dict[str, dict]:
    """Teacher and student of a run on the same captions and noise.

    Args:
      run: trained.
      num_seeds: held-out seeds for the accuracy.
      seed: of captions and noise; no training draws from it.

    Returns:
      ``{"teacher" | "student": {"accuracy", "diversity", "images"}}``.
    """
    each = shapes.captions_of(np.arange(num_seeds), seed)
    shortest = [caption for caption in shapes.captions() if caption.count(" ") == 2]
    repeated = shortest * IMAGES_OF_ONE
    found = {}
    for name in ("teacher", "student"):
        images = {}
        for part, captions in (("each", each), ("repeated", repeated)):
            pair = trained_pair(run, captions)
            maker = pair.student() if name == "student" else pair.sampler(TEACHER_STEPS)
            images[part] = sampling.generate(
                maker,
                pair.noise(seed + (part == "repeated")),
                pair.condition,
                len(captions),
                100,
                run.mesh,
            ).images
        found[name] = {
            "accuracy": shapes.accuracy(images["each"], each),
            "diversity": shapes.diversity(images["repeated"], repeated),
            "images": images["each"],
        }
    return found


def grid(images: np.ndarray, columns: int = 20, zoom: int = 3) -> Image.Image:
    """The first two rows of images, enlarged."""
    side = images.shape[1]
    rows = images[: 2 * columns].reshape(2, columns, side, side, 3)
    pixels = rows.transpose(0, 2, 1, 3, 4).reshape(2 * side, columns * side, 3)
    picture = Image.fromarray(np.uint8(np.clip(pixels / 2 + 0.5, 0, 1) * 255.0 + 0.5))
    size = (picture.width * zoom, picture.height * zoom)
    return picture.resize(size, Image.Resampling.NEAREST)


def main(workdirs: list[pathlib.Path], num_seeds: int) -> None:
    """Prints a row for each who paints; writes a grid of each into its workdir."""
    for workdir in workdirs:
        config = ml_collections.ConfigDict(
            json.loads((workdir / "config.json").read_text())
        )
        run = Run(config, workdir, sharding.create_mesh(-1, 1))
        for name, found in scores(run, num_seeds).items():
            grid(found["images"]).save(workdir / f"{name}.png")
            print(
                f"{workdir}  {name:8}  accuracy {found['accuracy']:6.1%}  "
                f"diversity {found['diversity']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdirs", type=pathlib.Path, nargs="+")
    parser.add_argument("--num_seeds", type=int, default=200)
    main(**vars(parser.parse_args()))
