"""A pipeline's folder in diffusers format: where it is, and what is in it.

Nothing in it is executed: JSON, safetensors and msgpack are read, pickles never are,
and no name in it may lead out of it.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from boot_jax.jsons import read_object
from boot_jax.models.weights import is_plain_name
from boot_jax.teachers.base import TeacherError

_INDEX = "model_index.json"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")

# What is fetched from the hub: no pickles, of the variants only the usual one, and not
# the whole pipeline in one file that often lies beside its parts. The text is the
# merges of tokenizers; the card is there for its licence.
_WANTED = ("*.json", "*/merges.txt", "README.md", "*/*.safetensors", "*/*.msgpack")
_WANTED += ("diffusion_pytorch_model*.safetensors", "diffusion_flax_model.msgpack")
_UNWANTED = ("*.fp16.*", "*.bf16.*", "*non_ema*", "safety_checker/*")


@dataclasses.dataclass(frozen=True)
class Component:
    """A part of a pipeline: its class in diffusers, its folder and its config.

    A Flax class is named as the PyTorch one whose weights and config it has.
    """

    class_name: str
    folder: pathlib.Path
    config: Mapping[str, Any]


def locate(path: str, revision: str = "") -> pathlib.Path:
    """The folder at a path, or that of a hub id, fetched or from the hub's cache.

    Token, cache and offline mode are those of ``huggingface_hub``, which reads them
    from its environment: a token in a config would be copied into workdirs.

    Raises:
      TeacherError: there is no such folder, and it cannot be fetched.
    """
    folder = pathlib.Path(path)
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(path):
        raise TeacherError(
            f"there is no folder {path}, and it is no hub id, which is OWNER/NAME"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise TeacherError(
            f"there is no folder {path}; to fetch it from the hub, install "
            "boot_jax[diffusers], or point teacher.path to a folder"
        ) from error
    try:
        fetched = huggingface_hub.snapshot_download(
            path,
            revision=revision or None,
            allow_patterns=list(_WANTED),
            ignore_patterns=list(_UNWANTED),
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TeacherError(
            f"{path} is no folder, and cannot be fetched from the hub ({reason}); "
            f"offline, copy it from where there is a network (hf download {path} "
            "--local-dir FOLDER) and point teacher.path to that folder"
        ) from error
    return pathlib.Path(fetched)


def read_index(folder: pathlib.Path) -> dict[str, Any]:
    """A pipeline's ``model_index.json``.

    Raises:
      TeacherError: it is missing or damaged.
    """
    if not (folder / _INDEX).is_file():
        raise TeacherError(
            f"{folder} has no {_INDEX}, so it is no pipeline in diffusers format; "
            "save the whole pipeline with save_pretrained, not its network alone"
        )
    return read_json(folder / _INDEX)


def read_components(folder: pathlib.Path) -> dict[str, Component]:
    """The parts of a pipeline by their names in its ``model_index.json``.

    Raises:
      TeacherError: the index or a part's config is missing or damaged, or a name would
        lead out of the folder.
    """
    return {
        name: _component(folder, name, entry[1])
        for name, entry in read_index(folder).items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    }


def _component(folder: pathlib.Path, name: str, class_name: Any) -> Component:
    if not is_plain_name(name):
        raise TeacherError(
            f"{folder / _INDEX} names a part {name!r}, which would lead out of the "
            "folder"
        )
    # Early pipelines of one network have all files side by side.
    own = folder / name if (folder / name).is_dir() else folder
    if "Scheduler" in str(class_name):
        file = own / "scheduler_config.json"
    else:
        file = own / "config.json"
    # Parts without a config, such as tokenizers, are refused by name later on.
    config = read_json(file) if file.exists() else {}
    return Component(str(class_name).removeprefix("Flax"), own, config)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      TeacherError: it cannot be read, or is something else.
    """
    return read_object(path, TeacherError)
