"""Our own teachers: one folder with ``model.json`` and ``model.safetensors``.

``model.json`` says all that the weights do not: network and its options, schedule,
prediction type, shape, and the classes or the vocabulary. So a folder is complete,
small, and free of pickles.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax import Array

from boot_jax.models import create_network
from boot_jax.schedules import get_schedule
from boot_jax.teachers.base import (
    Teacher,
    TeacherError,
    TextEncoder,
    network_denoiser,
)
from boot_jax.tokenizers import WordTokenizer

FORMAT = "boot_jax teacher, version 1"
_DESCRIPTION, _WEIGHTS = "model.json", "model.safetensors"


def describe(
    *,
    network: str,
    network_options: Mapping[str, Any],
    schedule: str,
    schedule_options: Mapping[str, Any],
    prediction_type: str,
    sample_shape: tuple[int, int, int],
    num_classes: int | None,
    tokenizer: WordTokenizer | None = None,
) -> dict[str, Any]:
    """The content of ``model.json``, from which `from_description` builds a teacher."""
    text = {} if tokenizer is None else {"text": json.loads(tokenizer.to_json())}
    return {
        "format": FORMAT,
        "network": {"name": network, **network_options},
        "schedule": {"name": schedule, **schedule_options},
        "prediction_type": prediction_type,
        "sample_shape": list(sample_shape),
        "num_classes": num_classes,
        **text,
    }


def from_description(
    description: Mapping[str, Any], params: Any = None, **overrides: Any
) -> Teacher:
    """A teacher of our own networks; fresh shapes for parameters when none are given.

    Args:
      description: as `describe` makes it.
      params: a tree of arrays; None for a tree of `jax.ShapeDtypeStruct`.
      **overrides: fields of the network, such as ``dtype``, that change no parameter.

    Raises:
      TeacherError: the description lacks a part, or names what does not exist.
    """
    try:
        sample_shape = tuple(description["sample_shape"])
        num_classes = description["num_classes"]
        text = _text_encoder(description.get("text"))
        network = create_network(
            **description["network"],
            sample_shape=sample_shape,
            num_classes=num_classes,
            **_text_sizes(text),
            **overrides,
        )
        schedule = get_schedule(**description["schedule"])
        prediction_type = description["prediction_type"]
        if params is None:
            init = initialiser(network, sample_shape, num_classes)
            params = jax.eval_shape(init, jax.random.key(0))
    except (KeyError, TypeError, ValueError) as error:
        raise TeacherError(
            f"the teacher's {_DESCRIPTION} cannot be used: {error}"
        ) from error
    return Teacher(
        denoise=network_denoiser(network, schedule, prediction_type),
        params=params,
        schedule=schedule,
        sample_shape=sample_shape,
        num_classes=num_classes,
        network=network,
        prediction_type=prediction_type,
        text=text,
    )


def _text_encoder(description: Mapping[str, Any] | None) -> TextEncoder | None:
    """Of a network that reads words itself."""
    if description is None:
        return None
    return TextEncoder(
        tokenizer=WordTokenizer.from_json(json.dumps(description)),
        encode=lambda params, tokens: {"tokens": tokens},
        params={},
    )


def _text_sizes(text: TextEncoder | None) -> dict[str, int]:
    if text is None:
        return {}
    assert isinstance(text.tokenizer, WordTokenizer)
    (length,) = text.tokenizer.row_shape
    return {"vocab_size": text.tokenizer.vocabulary_size, "text_length": length}


def initialiser(
    network: nn.Module, sample_shape: tuple[int, ...], num_classes: int | None
) -> Callable[[Array], Any]:
    """``key -> params`` of a network for images of one shape."""

    def init(key: Array) -> Any:
        image, time = jnp.zeros((1, *sample_shape)), jnp.zeros((1,))
        condition = None
        if num_classes is not None:
            condition = {"label": jnp.zeros((1,), jnp.int32)}
        if getattr(network, "vocab_size", None) is not None:
            length: int = network.text_length  # type: ignore[attr-defined]
            condition = {"tokens": jnp.zeros((1, length), jnp.int32)}
        return network.init(key, image, time, condition)["params"]

    return jax.jit(init)


def save_teacher(
    folder: str | pathlib.Path, description: Mapping[str, Any], params: Any
) -> None:
    """Writes a teacher's folder, of arrays on the host.

    The weights come first, and each file whole: a kill leaves no half.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in flat.items()}
    partial = folder / (_WEIGHTS + ".partial")
    safetensors.numpy.save_file(tensors, str(partial))
    partial.replace(folder / _WEIGHTS)
    partial = folder / (_DESCRIPTION + ".partial")
    partial.write_text(json.dumps(description, indent=2) + "\n")
    partial.replace(folder / _DESCRIPTION)


def exists(folder: str | pathlib.Path) -> bool:
    """Whether a teacher's folder is there, whole."""
    folder = pathlib.Path(folder)
    return (folder / _DESCRIPTION).is_file() and (folder / _WEIGHTS).is_file()


def load_teacher(folder: str | pathlib.Path, **overrides: Any) -> Teacher:
    """Reads a teacher's folder.

    Args:
      folder: with ``model.json`` and ``model.safetensors``.
      **overrides: fields of the network, such as ``dtype``.

    Returns:
      The teacher, its parameters as numpy arrays: each device takes its part of them.

    Raises:
      TeacherError: it is missing or foreign, or its weights do not fit its network;
        names each missing, unexpected and mis-shaped tensor.
    """
    folder = pathlib.Path(folder)
    if not exists(folder):
        raise TeacherError(
            f"there is no teacher in {folder}: {_DESCRIPTION} and {_WEIGHTS} are needed"
        )
    try:
        description = json.loads((folder / _DESCRIPTION).read_text())
        tensors = safetensors.numpy.load_file(str(folder / _WEIGHTS))
    except (ValueError, OSError, safetensors.SafetensorError) as error:
        message = f"the teacher in {folder} cannot be read: {error}"
        raise TeacherError(message) from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise TeacherError(
            f"{folder / _DESCRIPTION} was not written by boot_jax; a teacher in "
            "diffusers format has a model_index.json instead"
        )
    teacher = from_description(description, **overrides)
    wanted: dict[str, Any] = flax.traverse_util.flatten_dict(teacher.params, sep="/")
    problems = [f"missing {name}" for name in wanted.keys() - tensors.keys()]
    problems += [f"unexpected {name}" for name in tensors.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {tensors[name].shape}, not {wanted[name].shape}"
        for name in wanted.keys() & tensors.keys()
        if tensors[name].shape != wanted[name].shape
    ]
    if problems:
        raise TeacherError(
            f"the weights in {folder} do not fit its network: "
            + "; ".join(sorted(problems))
        )
    params = flax.traverse_util.unflatten_dict(tensors, sep="/")
    return from_description(description, params, **overrides)
