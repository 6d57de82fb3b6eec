"""Folders of arrays that are there whole, verified, or not at all.

A folder is written under a name of its own and renamed when all of it is on the disk;
its ``meta.json`` has the SHA-256 of every file. So several processes may open one at
once, and be killed at any time: what they find is whole, or is written anew.
"""

import errno
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import tqdm

from boot_jax import distributed
from boot_jax.prompts.files import PromptError

_META = "meta.json"

# A part-written folder that nobody has written to for so long is of a dead process.
_DEAD_SECONDS = 3600

_ATTEMPTS = 3


class ArrayWriter:
    """Writes a ``.npy`` file some rows at a time, so that no page of it is mapped."""

    def __init__(
        self, path: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype | type
    ):
        """An array of one shape; `write` must come to all its rows."""
        self._path, self._file = path, path.open("wb")
        self._shape, self._dtype = shape, np.dtype(dtype)
        self._rows = 0
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_2_0(self._file, header)

    def write(self, rows: np.ndarray) -> None:
        """Appends rows ``[n, *shape[1:]]``."""
        if rows.shape[1:] != self._shape[1:]:
            raise PromptError(
                f"{self._path.name} has rows of shape {self._shape[1:]}, not of "
                f"{rows.shape[1:]}"
            )
        self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
        self._rows += len(rows)

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends the file; raises `PromptError` if it has too many rows or too few."""
        self._file.close()
        if kind is None and self._rows != self._shape[0]:
            raise PromptError(
                f"{self._path.name} was to have {self._shape[0]} rows and got "
                f"{self._rows}; have the files of prompts changed meanwhile?"
            )


def read_array(path: pathlib.Path) -> np.ndarray:
    """The array of a file, mapped into memory, not read."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def key_of(*parts: Any) -> str:
    """32 hexadecimal digits for what JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def ensure(
    folder: pathlib.Path, write: Callable[[pathlib.Path], dict[str, Any]]
) -> dict[str, Any]:
    """Finds a folder whole, or has it written; process 0 does it for all.

    Args:
      folder: its last name, and that of nothing else, says what is in it.
      write: fills the empty folder it is given; returns what else ``meta.json`` is to
        say.

    Returns:
      What ``meta.json`` says.

    Raises:
      PromptError: it cannot be written or does not stay whole, or a process does not
        see it; what `write` raises.
    """
    meta = distributed.on_main(lambda: _ensure(folder, write), takes_long=True)
    if not distributed.wait_for_all((folder / _META).exists):
        raise PromptError(
            f"not every process sees {folder}; cache_dir must lie on storage that all "
            "of them share"
        )
    return meta


def progress_bar(title: str, total: int | None = None) -> tqdm.tqdm:
    """A bar that counts prompts; in a log, a line every 15 seconds."""
    interactive = sys.stderr.isatty()
    return tqdm.tqdm(
        total=total,
        desc=title,
        unit="prompt",
        unit_scale=True,
        mininterval=0.2 if interactive else 15.0,
        dynamic_ncols=interactive,
    )


def say(text: str) -> None:
    """One line for whoever started the program."""
    print(f"prompts: {text}", file=sys.stderr, flush=True)


def _ensure(
    folder: pathlib.Path, write: Callable[[pathlib.Path], dict[str, Any]]
) -> dict[str, Any]:
    for _ in range(_ATTEMPTS):
        meta = _verified(folder)
        if meta is not None:
            return meta
        try:
            _write_whole(folder, write)
        except OSError as error:
            raise PromptError(
                f"cannot write to {folder.parent} ({error.strerror or error}); make "
                "room or choose another cache_dir"
            ) from error
    raise PromptError(
        f"{folder} was written {_ATTEMPTS} times and never read back whole; choose "
        "a cache_dir on another disk"
    )


def _write_whole(
    folder: pathlib.Path, write: Callable[[pathlib.Path], dict[str, Any]]
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_dead(folder)
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex}")
    damaged = partial.with_name(f"{partial.name}-damaged")
    try:
        partial.mkdir()
        meta = write(partial)
        files = {path.name: _describe(path) for path in sorted(partial.iterdir())}
        text = json.dumps(meta | {"files": files}, indent=2)
        (partial / _META).write_text(text, encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _to_disk(path)
        if _verified(folder) is None:  # another process may have been faster
            _put_in_place(partial, folder, damaged)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(damaged, ignore_errors=True)


def _put_in_place(
    partial: pathlib.Path, folder: pathlib.Path, damaged: pathlib.Path
) -> None:
    try:
        if folder.exists():
            folder.rename(damaged)
        partial.rename(folder)
    except OSError as error:
        # Another process has just done one or the other: what is there is looked at.
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise
    _to_disk(folder.parent)


def _verified(folder: pathlib.Path) -> dict[str, Any] | None:
    """What a whole folder says of itself; None if it is absent or damaged."""
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        for name, wanted in meta["files"].items():
            size = (folder / name).stat().st_size
            if size != wanted["bytes"] or _describe(folder / name) != wanted:
                raise ValueError(f"{name} is not as it was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        say(f"{folder} is damaged ({error}) and is written anew")
        return None
    return meta


def _describe(path: pathlib.Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}


def file_hash(path: pathlib.Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_dead(folder: pathlib.Path) -> None:
    for partial in folder.parent.glob(f"{folder.name}.partial-*"):
        try:
            latest = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
        except OSError:  # its process has just renamed it
            continue
        if time.time() - latest > _DEAD_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)


def _to_disk(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
