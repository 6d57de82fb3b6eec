"""All forms of a student in one folder, which appears whole or not at all.

README.md                      the model card
model_index.json, scheduler/,  for PyTorch diffusers, where it has such a network
unet/ (or network/, pipeline.py)
jax/student.jax_export         for jax alone
jax/ema_params.safetensors     the parameters, by the names of our network
jax/config.json                the run's config
"""

import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from boot_jax import config as config_lib
from boot_jax.export.artifact import serialize, why_not
from boot_jax.export.card import Origin, model_card
from boot_jax.export.diffusers import save_pipeline, stock_model
from boot_jax.export.finished import ExportError, FinishedStudent
from boot_jax.export.folding import StockModel

ARTIFACT, PARAMETERS = "jax/student.jax_export", "jax/ema_params.safetensors"


def write_export(
    folder: pathlib.Path,
    finished: FinishedStudent,
    *,
    config: Any,
    results: Mapping[str, Any] | None,
    origin: Origin,
    warn: Callable[[str], None],
) -> pathlib.Path:
    """Writes the folder; an earlier export there is replaced.

    Args:
      folder: where to.
      finished: the student.
      config: of its run.
      results: of its evaluation; None if it has not been evaluated.
      origin: its teacher.
      warn: told, in one line, of a form that this student cannot have.

    Returns:
      The folder.

    Raises:
      ExportError: the folder cannot be written.
    """
    stock, reason = _stock_model(finished, origin, warn)
    too_large = why_not(finished)
    if too_large:
        warn(f"no {ARTIFACT}: {too_large}")

    def write(partial: pathlib.Path) -> None:
        (partial / "jax").mkdir()
        if not too_large:
            (partial / ARTIFACT).write_bytes(serialize(finished))
        tensors = flatten_dict(finished.params, sep="/")
        safetensors.numpy.save_file(
            {name: np.ascontiguousarray(leaf) for name, leaf in tensors.items()},
            str(partial / PARAMETERS),
        )
        (partial / "jax" / "config.json").write_text(config_lib.to_json(config))
        if stock is not None:
            save_pipeline(partial, stock, finished.num_classes)
        card = model_card(
            finished,
            config=config,
            results=results,
            origin=origin,
            stock=stock,
            why_no_stock=reason,
            why_no_artifact=too_large,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")

    try:
        _write_whole(folder, write)
    except OSError as error:
        raise ExportError(f"cannot write {folder} ({error.strerror})") from error
    return folder


def _stock_model(
    finished: FinishedStudent, origin: Origin, warn: Callable[[str], None]
) -> tuple[StockModel | None, str]:
    """The model for diffusers, or why there is none."""
    try:
        return stock_model(finished, origin.parts), ""
    except ExportError as error:
        warn(f"no folder for PyTorch diffusers: {error}")
        return None, str(error)


def _write_whole(folder: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
    """Fills a folder under another name, and only then gives it its own."""
    partial, old = (
        folder.with_name(f"{folder.name}.{end}") for end in ("partial", "old")
    )
    for left_over in (partial, old):
        if left_over.exists():
            shutil.rmtree(left_over)
    partial.mkdir(parents=True)
    write(partial)
    if folder.exists():
        folder.replace(old)
    partial.replace(folder)
    if old.exists():
        shutil.rmtree(old)
