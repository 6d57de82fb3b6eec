"""Who does what, where several processes compare in one workdir at once."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator
from typing import IO

from boot_jax import distributed


@contextlib.contextmanager
def claimed(path: pathlib.Path, *, wait: bool = False) -> Iterator[bool]:
    """Within, no other process holds this claim; gives whether it could be had.

    The claim is a lock on the file (``flock``), which the system takes back from a
    process that ends, however it does. The file stays, and means nothing by itself.

    Args:
      path: of the lock file; its folder is made if it is not there.
      wait: until another process lets go of it; else that gives False.
    """
    held: list[IO[str]] = []

    def take() -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return False
        held.append(file)
        return True

    try:
        yield distributed.on_main(take, takes_long=wait)
    finally:
        for file in held:
            file.close()
