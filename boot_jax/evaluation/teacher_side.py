"""The teacher's half of a paired evaluation: measured once, for many students.

A folder holds it: ``teacher.json`` (the figures of its samplers, and what they depend
on), ``ode.npz`` (the ODE's samples as features have them, in the form of
`boot_jax.evaluation.reference`), ``signals.npz`` (the exact signal at target times),
``shown.npz`` (rows of a grid) and ``targets.npy``: where each noise leads, from which a
student's images are read batch by batch.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from boot_jax.evaluation.features import FeatureExtractor
from boot_jax.evaluation.over_time import ExactSignals
from boot_jax.evaluation.reference import Measured, read_reference, write_reference
from boot_jax.workdir import write_text

_FIGURES, _ODE, _TARGETS = "teacher.json", "ode.npz", "targets.npy"
_SIGNALS, _SHOWN = "signals.npz", "shown.npz"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TeacherSide:
    """What a student is scored against.

    Attributes:
      ddim: the figures of the teacher's DDIM by number of steps.
      ode: those of its ODE.
      own: the ODE's samples as features have them.
      spread: the total variance of the ODE's samples.
      exact: the signal at target times.
      rows: label to samples ``[n, H, W, C]`` of a sampler, for a grid.
    """

    ddim: dict[str, dict[str, Any]]
    ode: dict[str, Any]
    own: Measured
    spread: float
    exact: ExactSignals
    rows: dict[str, np.ndarray]


class Targets:
    """Where noises lead, on disk; written batch by batch, and read so.

    Args:
      folder: which holds them.
      shape: ``[N, H, W, C]`` to write them; None to read them.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...] | None = None) -> None:
        path = folder / _TARGETS
        if shape is None:
            self._array = np.load(path, mmap_mode="r")
        else:
            self._array = np.lib.format.open_memmap(
                path, mode="w+", dtype=np.float32, shape=shape
            )

    def write(self, indices: np.ndarray, samples: np.ndarray) -> None:
        """Keeps the samples of some images."""
        self._array[indices] = samples

    def flush(self) -> None:
        """Writes to the disk what is still in memory."""
        self._array.flush()

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The samples of some images."""
        return np.array(self._array[indices])


def write_teacher_side(
    folder: Path, side: TeacherSide, provenance: Mapping[str, Any]
) -> None:
    """Writes all but the targets; ``teacher.json`` last, which says that all is there.

    Args:
      folder: which is there.
      side: what is written.
      provenance: what it depends on.
    """
    write_reference(folder / _ODE, side.own)
    np.savez(folder / _SIGNALS, times=side.exact.times, signals=side.exact.signals)
    labels = list(side.rows)
    np.savez(folder / _SHOWN, labels=np.array(labels), images=[*side.rows.values()])
    told = {
        "ddim": side.ddim,
        "ode": side.ode,
        "spread": side.spread,
        "provenance": provenance,
    }
    write_text(folder / _FIGURES, json.dumps(told, indent=2, allow_nan=False) + "\n")


def has_teacher_side(folder: Path) -> bool:
    """Whether all of it is there."""
    return (folder / _FIGURES).is_file()


def read_teacher_side(folder: Path, features: FeatureExtractor) -> TeacherSide:
    """Reads what `write_teacher_side` wrote, with these features."""
    told = json.loads((folder / _FIGURES).read_text())
    with np.load(folder / _SIGNALS) as file:
        exact = ExactSignals(file["times"], file["signals"])
    with np.load(folder / _SHOWN) as file:
        rows = dict(zip(file["labels"].tolist(), file["images"], strict=True))
    return TeacherSide(
        ddim=told["ddim"],
        ode=told["ode"],
        own=read_reference(folder / _ODE, features),
        spread=told["spread"],
        exact=exact,
        rows=rows,
    )
