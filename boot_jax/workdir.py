"""The folder of a run: whose it is, and what is in it."""

import json
import os
import pathlib
from typing import Any

from boot_jax import config as config_lib
from boot_jax import distributed

_PARTIAL = ".partial"


class WorkdirError(ValueError):
    """A workdir that cannot be written, or that belongs to another run."""


def open_workdir(path: str | pathlib.Path, config: Any) -> pathlib.Path:
    """Makes the folder, or finds that it is this config's; writes ``config.json``.

    Nothing is written over before both are known. Process 0 does it for all, which must
    see the same folder.

    Raises:
      WorkdirError: it cannot be written, it belongs to another config and ``run.force``
        is not set, or a process does not see it.
    """
    if "://" in str(path):
        raise WorkdirError(
            f"the workdir {path} is an address, not a folder; mount it on every "
            "machine, and give the folder where it is mounted"
        )
    folder = pathlib.Path(path).absolute()
    kept = folder / "config.json"
    distributed.on_main(lambda: _open(folder, kept, config))
    if not distributed.wait_for_all(kept.exists):
        raise WorkdirError(
            f"not every process sees the workdir {folder}; it must lie on storage that "
            "all of them share"
        )
    return folder


def _open(folder: pathlib.Path, kept: pathlib.Path, config: Any) -> None:
    try:
        if kept.exists():
            _check_owner(folder, kept, config)
        elif _is_foreign(folder) and not config.run.force:
            raise WorkdirError(
                f"{folder} is not empty and not a workdir of boot_jax; choose another "
                "--workdir"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_text(kept, config_lib.to_json(config))
    except OSError as error:
        raise WorkdirError(
            f"cannot write to the workdir {folder} ({error.strerror}); choose another "
            "--workdir"
        ) from error


def _is_foreign(folder: pathlib.Path) -> bool:
    """Whether it holds anything but a config that another process is writing."""
    if not folder.exists():
        return False
    return any(not path.name.endswith(_PARTIAL) for path in folder.iterdir())


def _check_owner(folder: pathlib.Path, kept: pathlib.Path, config: Any) -> None:
    new = config.to_dict()
    try:
        old = json.loads(kept.read_text())
        changed = config_lib.differences(old, new)
    except (AttributeError, ValueError) as error:
        raise WorkdirError(
            f"{kept} is not a config of boot_jax; choose another --workdir"
        ) from error
    # A config alone has nothing to lose: its run was refused, or never began.
    alone = old.keys() == new.keys() and list(folder.iterdir()) == [kept]
    if changed and not alone and not config.run.force:
        shown = "; ".join(changed[:3]) + ("; ..." if len(changed) > 3 else "")
        raise WorkdirError(
            f"{folder} belongs to another config ({shown}); choose another --workdir, "
            "or --config.run.force=True to go on all the same"
        )


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all, whoever else writes it at the same time."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
