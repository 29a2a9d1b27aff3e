"""Workdir of a run: lock, config.json, tokenizer files, and the check that it belongs to the given config."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from typing import Any

import filelock
import jax
from etils import epath

from moe.atomic_files import write_atomic
from moe.checkpoints.manager import complete_steps
from moe.config import Config, ConfigError, to_dict
from moe.routing.resolve import from_config_dict

LOCK, CONFIG = ".lock", "config.json"

#: Fields, or prefixes of fields, that do not change what is learnt: they may differ when a run is resumed.
FREE_FIELDS = (
    "data.directory",
    "mesh.",
    "model.remat",
    "model.scan_layers",
    "model.moe.dispatch",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.max_skipped_steps",
    "train.on_skipped_steps",
    "train.sample_tokens",
    "train.save_every",
)

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """Hold the lock of an existing workdir; the kernel releases it however the process ends.

    In a multi-process run process 0 holds it. On a file system without locks (some mounted buckets) nothing is held.

    Raises:
        ConfigError: another run holds it, or the workdir cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    # A soft lock would be left behind by a killed run.
    lock = filelock.FileLock(workdir / LOCK, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise ConfigError(f"--workdir={workdir}: another run uses it; wait for it, or use another workdir") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise ConfigError(f"--workdir={workdir}: cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        lock.release()


def has_config(workdir: epath.Path) -> bool:
    """Return True if a run was started in the workdir."""
    return (workdir / CONFIG).exists()


def read_config(workdir: str | os.PathLike[str]) -> Config:
    """Read the config that a run or an import left beside its checkpoints.

    Raises:
        ConfigError: the file is missing or is not a config.
    """
    path = epath.Path(workdir) / CONFIG
    if not path.exists():
        raise ConfigError(f"{path}: no such file")
    try:
        return from_config_dict(json.loads(path.read_text()))
    except (ValueError, RecursionError) as error:  # not text, not JSON, or not a config
        raise ConfigError(f"{path}: {error}") from error


def refuse_other_run(config: Config, workdir: epath.Path) -> None:
    """Raise ConfigError, naming the fields, if the workdir holds a run of another config."""
    theirs, ours = (_flatten(json.loads(json.dumps(to_dict(tree)))) for tree in (read_config(workdir), config))
    differing = [
        f"{name} (there {theirs[name]!r}, here {ours[name]!r})"
        for name in sorted(ours)
        if theirs[name] != ours[name] and not name.startswith(FREE_FIELDS)
    ]
    if differing:
        raise ConfigError(
            f"--workdir={workdir}: holds a run with another config; use another workdir, "
            f"or set back {'; '.join(differing)}"
        )


def refuse_orphaned_checkpoints(workdir: epath.Path) -> None:
    """Raise ConfigError if there are checkpoints without the config that describes them."""
    if steps := complete_steps(workdir):
        raise ConfigError(
            f"--workdir={workdir}: holds a checkpoint of step {steps[-1]} but no {CONFIG}; put that file back, or use "
            "another workdir"
        )


def write_run_files(config: Config, tokenizer_files: dict[str, bytes], workdir: epath.Path, *, new: bool) -> None:
    """Write the tokenizer, then the config, which marks the run as started.

    Args:
        config: of the run.
        tokenizer_files: name → content.
        workdir: existing folder.
        new: no run was started in it; otherwise only a missing tokenizer file is written.

    Raises:
        ConfigError: a tokenizer file differs from this run's.
    """
    if jax.process_index() != 0:
        return
    for name, content in tokenizer_files.items():
        if new or not (workdir / name).exists():
            write_atomic(workdir / name, content)
        elif (workdir / name).read_bytes() != content:
            raise ConfigError(f"{workdir / name}: differs from this run's tokenizer; delete it to have it restored")
    if new:
        write_atomic(workdir / CONFIG, json.dumps(to_dict(config), indent=2).encode())


@contextlib.contextmanager
def disk_errors(workdir: epath.Path) -> Iterator[None]:
    """Turn errors of a full, read-only or failing disk into ConfigError with the step to continue from."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir}: {error.strerror or error} ({error.filename or 'while writing'}); once that is "
            f"fixed, the same command continues from step {max(complete_steps(workdir), default=0)}"
        ) from error


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
