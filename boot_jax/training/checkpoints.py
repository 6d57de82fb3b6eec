"""Checkpoints: orbax, asynchronous, each with what it takes to trust it.

Beside the state lies the run's metadata (config, teacher fingerprint, versions), which
is compared before anything is restored: a checkpoint of another run is refused, and
nothing is ever overwritten because of it.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from boot_jax.training.state import TrainState


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken, or of another run."""


class Checkpoints:
    """The checkpoints of one run, newest last.

    Args:
      directory: made if it is not there.
      metadata: JSON-able; ``metadata["identity"]`` is what a resume must agree on.
      keep: how many of the newest stay.
      force: restore even if the identity differs.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        metadata: Mapping[str, Any],
        keep: int = 2,
        force: bool = False,
    ) -> None:
        self._directory = pathlib.Path(directory).absolute()
        self._metadata = dict(metadata)
        self._force = force
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest_step(self) -> int | None:
        """The newest step that was saved whole; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Begins to save in the background; the state may be donated at once."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                metadata=ocp.args.JsonSave(self._metadata),
            ),
        )

    def restore(self, template: Any) -> TrainState:
        """The newest state, placed as the template is.

        Args:
          template: a `TrainState` of arrays, or of shapes with shardings.

        Raises:
          CheckpointError: there is none, it belongs to another run, or it does not fit.
        """
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"there is no checkpoint in {self._directory}")
        self._check_identity(step)
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding
            ),
            template,
        )
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)),
            )
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._directory} does not fit this "
                f"config ({_first_line(error)}); use another workdir"
            ) from error
        return restored["state"]

    def _check_identity(self, step: int) -> None:
        try:
            saved = self._manager.restore(
                step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
            )["metadata"]
            identity = saved["identity"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"{self._directory} does not hold checkpoints of boot_jax; "
                "use another workdir"
            ) from error
        mine = self._metadata["identity"]
        changed = [name for name in mine if identity.get(name) != mine[name]]
        if changed and not self._force:
            name = changed[0]
            raise CheckpointError(
                f"the checkpoints in {self._directory} were made with another {name} "
                f"({identity.get(name)}, now {mine[name]}); use another workdir, or "
                "--config.run.force=True to go on all the same"
            )

    def wait(self) -> None:
        """Blocks until the save in progress, if any, is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes what is in progress and lets go of the directory."""
        self._manager.close()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
