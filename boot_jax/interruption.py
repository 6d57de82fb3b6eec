"""Stopping in good order: signals, the platform's notice, and what hangs.

``SIGTERM`` and ``SIGINT`` ask a run to stop. While it trains, it saves at the next
step boundary; anywhere else (start, compilation, evaluation, sampling) everything
worth keeping is on disk already, and it ends at once. Either way the exit code is
`EXIT_PREEMPTED`, which tells a scheduler to start the same command again. A second
signal quits without waiting for anything; unless it comes within a second, as the same
request does that a launcher and a scheduler both pass on.

A signal must be heard while the main thread compiles or waits for a device, where
Python runs no handler. So the interpreter writes it into a pipe, and a thread listens.

Among several processes, JAX's own handler of ``SIGTERM`` tells the others, and all
agree on one step (`jax.experimental.multihost_utils.reached_preemption_sync_point`);
the notice of a cloud's platform comes the same way.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

EXIT_NOT_FINITE, EXIT_REFUSED = 1, 2
#: To be started again: EX_TEMPFAIL of sysexits.h, and the number after it.
EXIT_PREEMPTED, EXIT_STUCK = 75, 76

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Within which a second signal is the first one once more.
_ECHO_SECONDS = 1.0


class Preempted(Exception):
    """The run was asked to stop, and has saved; the same command goes on."""


class Interruption:
    """Hears the request to stop; a context manager, of the main thread.

    Outside of `protected` nothing is at stake: a signal ends the process at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requested: str | None = None
        self._requested_at = 0.0
        self._protected = False
        self._polls = 0
        self._notify: Callable[[int], None] | None = None
        self._finish: Callable[[], None] | None = None

    def __enter__(self) -> "Interruption":
        self._old = {number: signal.getsignal(number) for number in _SIGNALS}
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._install()
        self._listener = threading.Thread(
            target=self._listen, args=(reader,), name="boot_jax-signals", daemon=True
        )
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(self._writer)  # the listener reads the end, and ends
        self._listener.join()

    def _install(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)  # the pipe is what matters

    def join(self) -> None:
        """To be called once JAX knows its processes: takes over its own handler.

        Python's handler would replace that of JAX unheard; ours passes the signal on.
        """
        install = ctypes.CDLL(None).signal
        install.restype = ctypes.c_void_p
        install.argtypes = (ctypes.c_int, ctypes.c_void_p)
        address = install(signal.SIGTERM, None)
        self._install()
        if jax.process_count() > 1 and address:
            self._notify = ctypes.CFUNCTYPE(None, ctypes.c_int)(address)

    def _listen(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as pipe:
            while received := pipe.read(1):
                if received[0] in _SIGNALS:
                    self._hear(signal.Signals(received[0]))

    def _hear(self, received: signal.Signals) -> None:
        with self._lock:
            now, again = time.monotonic(), self._requested is not None
            if again and now - self._requested_at < _ECHO_SECONDS:
                return
            if not again:
                self._requested, self._requested_at = received.name, now
            protected, finish = self._protected, self._finish
        if again:
            say(f"{received.name} again: quitting at once")
            _leave(128 + received)
        if protected:
            say(f"{received.name}: saving after this step; once more quits at once")
            if self._notify is not None:
                self._notify(signal.SIGTERM)
            return
        say(f"{received.name}: stopping; the same command goes on")
        if finish is not None:
            # In a thread of its own, so that a second signal is still heard.
            threading.Thread(target=_finish_and_leave, args=(finish,)).start()
        else:
            _leave(EXIT_PREEMPTED)

    @contextlib.contextmanager
    def protected(self) -> Iterator[None]:
        """Within, a signal only raises a flag, for `poll` to see.

        Raises:
          Preempted: at the end, if the flag was raised after the last `poll`.
        """
        with self._lock:
            self._protected = True
        try:
            yield
        finally:
            with self._lock:
                self._protected = False
                requested = self._requested
        if requested is not None:
            raise Preempted(requested)

    @contextlib.contextmanager
    def finishing(self, finish: Callable[[], None]) -> Iterator[None]:
        """Within, ``finish`` is called before a signal ends the process."""
        self._finish = finish
        try:
            yield
        finally:
            self._finish = None

    def poll(self) -> bool:
        """Whether to save and stop here; every process must ask at every boundary."""
        self._polls += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._polls)
        return self._requested is not None


class Watchdog:
    """Ends the process if nothing moves; a context manager around what must move.

    Args:
      seconds: without a `beat`, until the process ends with `EXIT_STUCK`, its message
        and the stack of every thread; 0 for never.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._what, self._deadline = "", float("inf")
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        self._over.clear()
        self.beat("starting")
        if self._seconds > 0:
            name = "boot_jax-watchdog"
            threading.Thread(target=self._watch, name=name, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def beat(self, what: str, patience: float = 1.0) -> None:
        """Says what begins now, and how many times the usual seconds it may take."""
        self._what = what
        self._deadline = time.monotonic() + self._seconds * patience

    def _watch(self) -> None:
        pause = min(1.0, self._seconds / 10)
        while not self._over.wait(pause):
            if time.monotonic() > self._deadline:
                say(
                    f"watchdog: {self._what} took longer than allowed "
                    f"(run.watchdog_seconds={self._seconds:g}): a hung collective, a "
                    "dead peer or a stalled disk. The run stops; the same command goes "
                    "on from the last checkpoint"
                )
                faulthandler.dump_traceback(all_threads=True)
                _leave(EXIT_STUCK)


def say(text: str) -> None:
    """Writes a line on the terminal, from any thread; among several, says who."""
    prefix = f"process {jax.process_index()}: " if _joined() else ""
    print(f"{prefix}{text}", file=sys.stderr, flush=True)


def _joined() -> bool:
    # Not jax.process_count(): asked too early, it would start JAX alone.
    return jax.distributed.is_initialized()


def abandon(error: BaseException) -> NoReturn:
    """Ends this process because another has gone, for whom its exit would wait."""
    words = str(error).strip().splitlines()[0][:200]
    say(f"another process has gone ({words}); the same command goes on")
    _leave(EXIT_STUCK)


def _finish_and_leave(finish: Callable[[], None]) -> None:
    try:
        finish()
    finally:
        _leave(EXIT_PREEMPTED)


def _leave(code: int) -> NoReturn:
    """Ends the process from any thread, without waiting for any other."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
