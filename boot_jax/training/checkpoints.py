"""Checkpoints: orbax, asynchronous, each with what it takes to trust it.

Beside the state lies what the run was (config, teacher fingerprint, versions) and what
the state is (shape, type and checksum of every array). So a checkpoint of another run
is refused, one that does not fit is refused, and one that was damaged is noticed: it is
set aside under ``broken/``, never deleted, and the one before it is used.
"""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from boot_jax import distributed
from boot_jax.training import integrity
from boot_jax.training.state import TrainState

#: Saves in a row that may fail.
MOST_FAILURES = 3

_BROKEN = "broken"
# What disks do, of which tensorstore tells in the middle of longer messages.
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)


class CheckpointError(ValueError):
    """A checkpoint that is missing, of another run, or that cannot be written."""


@dataclasses.dataclass
class _Keep(PreservationPolicy):
    """The newest, and every so-many-th step for good."""

    newest: int
    every: int

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        first = len(checkpoints) - self.newest
        return [
            index >= first or bool(self.every and c.step and c.step % self.every == 0)
            for index, c in enumerate(checkpoints)
        ]


class Checkpoints:
    """The checkpoints of one run, newest last. Several processes call it alike.

    Args:
      directory: made if it is not there.
      metadata: JSON-able; ``metadata["identity"]`` is what a resume must agree on.
      keep: how many of the newest stay.
      keep_every: steps divisible by it stay for good; 0 for none.
      force: restore even if the identity differs.
      record: told of what goes wrong: ``record(event, **fields)``.

    Raises:
      CheckpointError: the directory cannot be made.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        metadata: Mapping[str, Any],
        keep: int = 2,
        keep_every: int = 0,
        force: bool = False,
        record: Callable[..., None] = lambda event, **fields: None,
    ) -> None:
        self._directory = pathlib.Path(directory).absolute()
        self._metadata = dict(metadata)
        self._policy = _Keep(keep, keep_every)
        self._force, self._record = force, record
        self._failures, self._saving = 0, False
        try:
            distributed.on_main(
                lambda: self._directory.mkdir(parents=True, exist_ok=True)
            )
            self._open()
        except OSError as error:
            raise CheckpointError(
                f"cannot write checkpoints to {self._directory} ({reason(error)}); "
                "choose another --workdir"
            ) from error

    def _open(self) -> None:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            cleanup_tmp_directories=True,  # what a kill in the middle of a save left
            create=False,
            # Else a folder that cannot be made is waited for, for minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest_step(self) -> int | None:
        """The newest step that was saved whole; None if there is none."""
        return self._manager.latest_step()

    def lost(self) -> bool:
        """Whether there is none, though there has been one."""
        return self.latest_step() is None and (self._directory / _BROKEN).is_dir()

    def save(self, state: TrainState) -> None:
        """Begins to save in the background; the state may be donated at once.

        A save that fails is reported, and `must_retry` then asks for another. After
        `MOST_FAILURES` in a row there is no more hope.

        Raises:
          CheckpointError: the directory has gone, or nothing can be written to it.
          FloatingPointError: the state holds NaN or infinity; nothing is saved.
        """
        step = int(state.step)
        self._settle()
        if step in self._manager.all_steps():
            return
        if not distributed.all_agree(self._directory.is_dir()):
            raise CheckpointError(
                f"{self._directory} has gone: moved, deleted or unmounted? Nothing was "
                "saved there; bring it back and run the same command again"
            )
        try:
            described = integrity.describe(state)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"step {step}: {error}. Nothing was saved; the checkpoints are from "
                "before"
            ) from error
        metadata = self._metadata | {"state": described}
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(_parts(state)),
            metadata=ocp.args.JsonSave(metadata),
        )
        self._attempt(lambda: self._manager.save(step, args=arguments))

    def finish(self, state: TrainState) -> None:
        """Saves, and blocks until it is on disk. Raises as `save` does."""
        self.save(state)
        while not self._settle():
            self.save(state)

    def must_retry(self) -> bool:
        """Whether the last save has failed, so that `save` should be called again.

        To be asked at every step; it waits for nothing. Raises `CheckpointError` if too
        many have failed in a row.
        """
        return not self._manager.is_saving_in_progress() and not self._settle()

    def wait(self) -> None:
        """Blocks until the save in progress, if any, is on disk.

        Raises:
          CheckpointError: it failed.
        """
        if not self._settle():
            raise self._unwritable("the last save failed")

    def _settle(self) -> bool:
        """Ends the save in progress; whether the last one is on disk."""
        if self._attempt(self._manager.wait_until_finished) and self._saving:
            self._saving, self._failures = False, 0
        return self._failures == 0

    def _attempt(self, action: Callable[[], Any]) -> bool:
        """Does what may fail for the disk's sake; whether it went well."""
        try:
            self._saving = action() is True or self._saving
        except (OSError, RuntimeError, ValueError) as error:
            if distributed.is_lost_peer(error):
                raise
            self._saving = False
            self._failures += 1
            why = reason(error)
            self._record("save_failed", why=why, tries=self._failures)
            _warn(
                f"a checkpoint could not be written to {self._directory} ({why}); "
                f"try {self._failures} of {MOST_FAILURES}"
            )
            # Among several processes the others do not know: this one stops, and so
            # do they.
            if jax.process_count() > 1:
                raise self._unwritable(why) from error
            self._open()  # forgets the save that failed, and clears away what it left
            if self._failures >= MOST_FAILURES:
                raise self._unwritable(why) from error
            return False
        return True

    def _unwritable(self, why: str) -> CheckpointError:
        steps = [path.name for path in self._directory.glob("*") if path.name.isdigit()]
        newest = max(map(int, steps), default=None)
        kept = "no checkpoint" if newest is None else f"the checkpoint of step {newest}"
        return CheckpointError(
            f"cannot write checkpoints to {self._directory} ({why}); {kept} is left as "
            "it was: mend that, and run the same command again"
        )

    def restore(self, template: Any) -> TrainState:
        """The newest state that is sound, placed as the template is.

        One that is broken is reported and set aside under ``broken/``.

        Args:
          template: a `TrainState` of arrays, or of shapes with shardings.

        Raises:
          CheckpointError: there is none, it belongs to another run, it does not fit, or
            none is sound.
        """
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            raise CheckpointError(
                f"there is no checkpoint in {self._directory}"
                + (", only broken ones" if self.lost() else "")
            )
        for step in steps:
            saved = distributed.on_main(lambda step=step: self._read_metadata(step))
            why = saved.get("broken")
            if why is None:
                self._check_identity(saved)
                self._check_fit(step, saved, template)
                state, why = self._read_state(step, saved, template)
                if state is not None:
                    return state
            self._set_aside(step, why or "it cannot be read by every process")
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {self._directory} is sound; they "
            f"are kept under {_BROKEN}/. Take another --workdir to start afresh"
        )

    def _read_metadata(self, step: int) -> dict[str, Any]:
        folder = self._directory / str(step)
        if not (folder / "state").is_dir() and not (folder / "metadata").is_dir():
            raise CheckpointError(
                f"{self._directory} does not hold checkpoints of boot_jax ({step} is "
                "none); use another workdir"
            )
        try:
            saved = json.loads((folder / "metadata" / "metadata").read_text())
            whole = isinstance(saved["identity"], dict) and isinstance(
                saved["state"], dict
            )
        except (ValueError, KeyError, TypeError, OSError) as error:
            return {"broken": f"its metadata cannot be read: {reason(error)}"}
        return saved if whole else {"broken": "its metadata is not ours"}

    def _check_identity(self, saved: Mapping[str, Any]) -> None:
        mine, identity = self._metadata["identity"], saved["identity"]
        changed = [name for name in mine if identity.get(name) != mine[name]]
        if changed and not self._force:
            name = changed[0]
            raise CheckpointError(
                f"the checkpoints in {self._directory} were made with another {name} "
                f"({identity.get(name)}, now {mine[name]}); use another workdir, or "
                "--config.run.force=True to go on all the same"
            )

    def _check_fit(self, step: int, saved: Mapping[str, Any], template: Any) -> None:
        words = integrity.misfits(saved["state"], template)
        if words:
            more = f" and {len(words) - 1} more" if len(words) > 1 else ""
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._directory} does not fit this "
                f"config ({words[0]}{more}); use another workdir"
            )

    def _read_state(
        self, step: int, saved: Mapping[str, Any], template: Any
    ) -> tuple[TrainState | None, str | None]:
        """The state if it is sound on every process; else what is wrong here."""
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding
            ),
            _parts(template),
        )
        state, why = None, None
        try:
            # The handler alone: a process that fails keeps no other waiting.
            parts = ocp.StandardCheckpointHandler().restore(
                epath.Path(self._directory / str(step) / "state"),
                args=ocp.args.StandardRestore(shapes),
            )
            state = template.replace(**parts)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # no fault of the checkpoint
        except Exception as error:  # whatever tensorstore meets in a damaged file
            why = reason(error)
        if not distributed.all_agree(why is None):
            return None, why
        try:
            found = integrity.describe(state)
        except FloatingPointError as error:
            return None, f"its {error}"
        bad = [n for n, leaf in saved["state"].items() if leaf != found[n]]
        if bad:
            return None, f"{len(bad)} arrays are not what was saved, {bad[0]} for one"
        return state, None

    def _set_aside(self, step: int, why: str) -> None:
        """Keeps a broken checkpoint where it is not taken for a good one."""

        def move() -> str:
            folder = self._directory / _BROKEN
            folder.mkdir(exist_ok=True)
            names = itertools.chain(
                [str(step)], (f"{step}-{index}" for index in itertools.count(2))
            )
            kept = next(folder / name for name in names if not (folder / name).exists())
            (self._directory / str(step)).rename(kept)
            return str(kept)

        kept = distributed.on_main(move)
        self._record("broken_checkpoint", step=step, why=why, kept=kept)
        _warn(
            f"the checkpoint of step {step} is broken ({why}); it is kept as {kept}, "
            "and the one before it is used"
        )
        self._open()

    def close(self) -> None:
        """Finishes what is in progress and lets go of the directory."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._manager.close()  # what failed has been told already


def _parts(state: TrainState) -> dict[str, Any]:
    """What a state holds, by field; one that is None is as if it did not exist."""
    fields = ((f.name, getattr(state, f.name)) for f in dataclasses.fields(state))
    return {name: value for name, value in fields if value is not None}


def reason(error: BaseException) -> str:
    """An error in a few words: those of the system, where they are among its own."""
    text = (
        os.strerror(error.errno) if isinstance(error, OSError) and error.errno else ""
    )
    text = text or str(error).strip()
    system = [word for word in map(os.strerror, _OF_DISKS) if word in text]
    return (system or text.splitlines() or [type(error).__name__])[0][:200]


def _warn(text: str) -> None:
    print(f"\nwarning: {text}", file=sys.stderr, flush=True)
