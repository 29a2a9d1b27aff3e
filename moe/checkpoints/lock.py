"""The lock of a run's workdir."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator

import jax
from etils import epath

from moe.config import ConfigError

LOCK = ".lock"


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """Keeps every other run out of an existing workdir; the kernel lets go however the process ends.

    Of several processes only process 0 holds it. Where the file system has no locks, nothing keeps a second run out.

    Raises:
        ConfigError: another run is in it, or it cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        file = (workdir / LOCK).open("a")
    except OSError as error:
        raise ConfigError(f"--workdir={workdir}: cannot be written ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--workdir={workdir}: another run is in it; wait for it, or use another one") from error
        except OSError:  # a file system without locks
            pass
        yield
