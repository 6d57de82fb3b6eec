"""An exported student with jax and numpy alone: no boot_jax, no network library.

python examples/run_artifact.py ARTIFACT IMAGES.npy [NOISE.npy]
"""

import sys

import jax.export
import numpy as np

with open(sys.argv[1], "rb") as file:
    student = jax.export.deserialize(bytearray(file.read()))
noise_aval, *label = student.in_avals  # (batch, height, width, channels), float32
shape = (8, *noise_aval.shape[1:])
noise = np.random.default_rng(0).standard_normal(shape, np.float32)
if len(sys.argv) > 3:
    noise = np.load(sys.argv[3])
labels = [np.zeros(len(noise), np.int32) for _ in label]  # where it has classes
images = np.asarray(student.call(noise, *labels))  # in [-1, 1]
np.save(sys.argv[2], images)
print(f"{len(images)} images of shape {images.shape[1:]} in one step: {sys.argv[2]}")
