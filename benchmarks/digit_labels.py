"""Whether a digit is the one that was asked for: scores runs with `data.labels`.

python benchmarks/digit_labels.py WORKDIR [WORKDIR ...]

Teacher and student paint every digit equally often, from the same noises. A support
vector classifier, trained on half of the real digits, reads them; what it reads right
of the other half is said first, and is about the most that samples can have.
"""

import argparse
import json
import pathlib

import ml_collections
import numpy as np
from sklearn.svm import SVC

from boot_jax import sampling, sharding
from boot_jax.data import load
from boot_jax.run import Run
from boot_jax.trained import trained_pair

TEACHER_STEPS = 50


def reader() -> tuple[SVC, float]:
    """The classifier, and its accuracy on the digits that it has not seen."""
    digits = load("digits")
    everything = np.arange(len(digits))
    rows = digits.images(everything).reshape(len(digits), -1)
    labels = digits.labels(everything)
    assert labels is not None
    classifier = SVC(gamma="scale", C=10.0).fit(rows[::2], labels[::2])
    return classifier, float(classifier.score(rows[1::2], labels[1::2]))


def scores(run: Run, num_images: int = 2000, seed: int = 77) -> dict[str, float]:
    """What is read right of the samples of a run.

    Args:
      run: trained, of a config whose `data.labels` is set.
      num_images: of each, labels in turn.
      seed: of the noise; no training draws from it.

    Returns:
      ``{"real", "teacher", "student"}``, shares of images.
    """
    classifier, real = reader()
    pair = trained_pair(run)
    found = {"real": real}
    for name in ("teacher", "student"):
        maker = pair.student() if name == "student" else pair.sampler(TEACHER_STEPS)
        images = sampling.generate(
            maker, pair.noise(seed), pair.condition, num_images, 500, run.mesh
        ).images
        asked = pair.condition(np.arange(num_images))["label"]
        rows = np.clip(images, -1.0, 1.0).reshape(num_images, -1)
        found[name] = float(classifier.score(rows, asked))
    return found


def main(workdirs: list[pathlib.Path], num_images: int) -> None:
    """Prints a row for each workdir."""
    for workdir in workdirs:
        config = ml_collections.ConfigDict(
            json.loads((workdir / "config.json").read_text())
        )
        run = Run(config, workdir, sharding.create_mesh(-1, 1))
        found = scores(run, num_images)
        print(
            workdir, *(f"{who} {share:.1%}" for who, share in found.items()), sep="  "
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdirs", type=pathlib.Path, nargs="+")
    parser.add_argument("--num_images", type=int, default=2000)
    main(**vars(parser.parse_args()))
