"""Weights of PyTorch diffusers as Flax parameters, both ways, without torch.

The modules are named so that the translation is mechanical. These are all its rules:

  * a list's index follows an underscore: ``resnets_1/conv1`` is ``resnets.1.conv1``;
  * ``kernel``, ``scale`` and ``embedding`` are all called ``weight`` there;
  * a convolution's kernel is HWIO here and OIHW there; a linear one is transposed;
  * old attentions say ``query``, ``key``, ``value`` and ``proj_attn``, some with 1x1
    convolutions instead of linear layers.
"""

import json
import os
import re
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  numpy learns bfloat16 by it, which files may hold
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

# Named, because ``time_embedding.linear_1`` ends in a number and is no list.
_LISTS = re.compile(
    r"(down_blocks|up_blocks|transformer_blocks|resnets|attentions|downsamplers"
    r"|upsamplers|to_out|net|layers|features)_(\d+)"
)
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}

#: Endings of files that may hold a pickle.
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

_LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class WeightsError(ValueError):
    """Tensors that do not fit a network, or a file that cannot be read."""


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a safetensors file, a ``*.safetensors.index.json``, or a folder with one.

    Returns:
      The tensors by name, in the file's own types (bfloat16 is that of ``ml_dtypes``).

    Raises:
      WeightsError: there is no such file, it is damaged, or a shard lacks a tensor.
    """
    path = Path(path)
    if path.is_dir():
        path = _find(path)
    if not path.name.endswith(".index.json"):
        return _read_file(path)
    names = _read_index(path)
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(names.values())):
        if not (path.parent / shard).is_file():
            raise WeightsError(f"{path} names {shard}, but there is no such file")
        tensors |= _read_file(path.parent / shard)
    lacking = sorted(set(names) - set(tensors))
    if lacking:
        raise WeightsError(f"{path} names tensors that its files lack: {lacking}")
    return tensors


def read_weights(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a model's folder, by diffusers' names: safetensors, or Flax's msgpack.

    Raises:
      WeightsError: there is neither, or it is damaged. A pickle is never opened: it is
        a program.
    """
    folder = Path(folder)
    if any(folder.glob("*.safetensors*")):
        return read_safetensors(folder)
    packed = sorted(folder.glob("*.msgpack"))
    if len(packed) == 1:
        return _read_msgpack(packed[0])
    pickles = [p.name for kind in PICKLES for p in sorted(folder.glob(f"*{kind}"))]
    found = f"only {', '.join(pickles)}, a pickle" if pickles else "no weights"
    raise WeightsError(
        f"{folder} holds {found}; one safetensors file, its index or one msgpack is "
        "needed. To convert a pickle whose maker you trust, where torch is installed: "
        'python -c "from diffusers import DiffusionPipeline as P; '
        "P.from_pretrained('PIPELINE').save_pretrained('NEW_FOLDER')\""
    )


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads one file of weights, by PyTorch's names.

    Args:
      path: a ``.safetensors``, an ``.npz`` of arrays by name, or Flax's ``.msgpack``.

    Raises:
      WeightsError: there is no such file, it is damaged, or it may be a pickle, which
        is a program; then with the command that converts it.
    """
    path = Path(path).expanduser()
    if path.suffix in PICKLES:
        new = path.with_suffix(".safetensors")
        raise WeightsError(
            f"{path} may be a pickle, which is never opened; convert it where torch is "
            'installed: python -c "import torch; from safetensors.torch import '
            f"save_file as s; t = torch.load('{path}', weights_only=True); "
            f"s({{k: v.contiguous() for k, v in t.items()}}, '{new}')\""
        )
    if not path.is_file():
        raise WeightsError(f"there is no file {path}")
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".msgpack":
        return _read_msgpack(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path} should be a .safetensors, .npz or .msgpack file")
    return _read_file(path)


def is_plain_name(name: str) -> bool:
    """Whether a name read from a file stays in its folder, on any system."""
    return re.fullmatch(r"[\w-][\w .-]*", name) is not None


def from_diffusers(
    tensors: Mapping[str, np.ndarray],
    template: Mapping[str, Any],
    *,
    ignore: Collection[str] = (),
) -> dict[str, Any]:
    """Turns tensors of a diffusers model into the parameters of a network of ours.

    Args:
      tensors: by diffusers' names, in PyTorch's layout.
      template: the parameters to fill, as arrays or ``jax.ShapeDtypeStruct``.
      ignore: prefixes of parameter paths, such as ``"added_embeddings"``. Tensors under
        them are not read; the template's leaves under them are returned as they are.

    Returns:
      The template's tree of numpy arrays, of the template's types.

    Raises:
      WeightsError: tensors are missing, unexpected or of another shape; lists them all.
    """
    leaves: dict[Any, Any] = dict(flatten_dict(template))
    paths = {diffusers_name(path): path for path in leaves}
    paths = {n: path for n, path in paths.items() if not _is_under(n, ignore)}
    given = {n: t for n, t in modern_names(tensors).items() if not _is_under(n, ignore)}
    shapes = {n: _torch_shape(path, leaves[path].shape) for n, path in paths.items()}
    given = {n: _as_linear(t, shapes.get(n, ())) for n, t in given.items()}
    misfits = [
        f"{n} is {given[n].shape}, not {shapes[n]}"
        for n in sorted(paths.keys() & given.keys())
        if given[n].shape != shapes[n]
    ]
    _refuse(
        {
            "missing": sorted(paths.keys() - given.keys()),
            "unexpected": sorted(given.keys() - paths.keys()),
            "of another shape": misfits,
        }
    )
    loaded = {
        path: np.array(_to_flax(path, given[n]), leaves[path].dtype, order="C")
        for n, path in paths.items()
    }
    return unflatten_dict(leaves | loaded)


def to_diffusers(
    params: Mapping[str, Any], *, ignore: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Turns our parameters into a diffusers model's tensors; undoes `from_diffusers`.

    Parameters under the path prefixes ``ignore`` are left out.
    """
    names = {path: diffusers_name(path) for path in flatten_dict(params)}
    return {
        names[path]: np.ascontiguousarray(_to_torch(path, np.asarray(leaf)))
        for path, leaf in flatten_dict(params).items()
        if not _is_under(names[path], ignore)
    }


def diffusers_name(path: Iterable[str]) -> str:
    """The name in diffusers of the parameter, or the module, at this path.

    >>> diffusers_name(("down_blocks_0", "resnets_1", "conv1", "kernel"))
    'down_blocks.0.resnets.1.conv1.weight'
    """
    *modules, leaf = path
    return ".".join([*map(_dotted, modules), _LEAVES.get(leaf, _dotted(leaf))])


def _dotted(module: str) -> str:
    match = _LISTS.fullmatch(module)
    return ".".join(match.groups()) if match else module


def modern_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gives old attention tensors today's names, unless those are taken."""
    renamed = {}
    for name, tensor in tensors.items():
        modules = [_LEGACY.get(module, module) for module in name.split(".")]
        new = ".".join(modules)
        renamed[name if new in tensors else new] = tensor
    return renamed


def _to_torch(path: Collection[str], array: np.ndarray) -> np.ndarray:
    """Flax's layout to PyTorch's; a view."""
    if [*path][-1] != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _to_flax(path: Collection[str], tensor: np.ndarray) -> np.ndarray:
    """PyTorch's layout to Flax's; a view."""
    if [*path][-1] != "kernel":
        return tensor
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _torch_shape(path: Collection[str], shape: tuple[int, ...]) -> tuple[int, ...]:
    return _to_torch(path, np.broadcast_to(np.float32(0), shape)).shape


def _as_linear(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A 1x1 convolution's kernel as the linear layer's that is wanted."""
    is_linear = tensor.ndim == 4 and tensor.shape == (*shape, 1, 1)
    return tensor.reshape(shape) if is_linear else tensor


def _is_under(name: str, prefixes: Collection[str]) -> bool:
    """Whether a diffusers name is that of a parameter under one of these paths."""
    dotted = (diffusers_name(prefix.split("/")) for prefix in prefixes)
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in dotted)


def _refuse(problems: Mapping[str, list[str]]) -> None:
    found = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if found:
        raise WeightsError(f"these tensors do not fit the network; {'; '.join(found)}")


def _find(folder: Path) -> Path:
    """A folder's one index, or else its one file without a variant such as fp16."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if file.name.count(".") == 1]
    found = sorted(folder.glob("*.safetensors.index.json")) or plain or files
    if len(found) != 1:
        names = [file.name for file in found] or "none"
        raise WeightsError(
            f"{folder} should hold one safetensors file or one index, but holds "
            f"{names}; name the file itself, or save the model as safetensors"
        )
    return found[0]


def _read_index(path: Path) -> dict[str, str]:
    try:
        names = dict(json.loads(path.read_text())["weight_map"])
        outside = [shard for shard in names.values() if not is_plain_name(shard)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path} is not an index of safetensors files: {error!r}"
        ) from error
    if outside:
        raise WeightsError(
            f"{path} names {outside[0]!r}, which would lead out of the folder"
        )
    return names


def _read_file(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, AttributeError) as error:
        # An AttributeError is a type that numpy lacks, such as float8.
        raise WeightsError(f"{path} cannot be read as safetensors: {error}") from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise WeightsError(f"{path} cannot be read as npz: {error}") from error


def _read_msgpack(path: Path) -> dict[str, np.ndarray]:
    """Flax parameters, whose modules are named as ours."""
    try:
        tree: Any = msgpack_restore(path.read_bytes())
        return to_diffusers(tree.get("params", tree))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path} cannot be read as Flax parameters: {error}"
        ) from error
