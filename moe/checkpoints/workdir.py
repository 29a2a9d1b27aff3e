"""Workdir of a run: lock, config.json, tokenizer files, and the check that it belongs to the given config."""

from __future__ import annotations

import contextlib
import enum
import json
import os
from collections.abc import Iterator
from typing import Annotated, Any

import filelock
import jax
import pydantic
from etils import epath

from moe.checkpoints.manager import complete_steps
from moe.config import Config, ConfigError, to_dict
from moe.config.parse import from_workdir_dict
from moe.data.tokenizer_files import TOKENIZER_FILES
from moe.dispatch.buffers import layer_capacity
from moe.system.atomic_files import NO_LOCKS, in_bucket, is_bucket_error, write_atomic
from moe.system.fields import facts_of
from moe.system.foreign_files import Fields, Step, parse
from moe.system.metrics_files import METRICS, iterate_rows
from moe.system.reading import read_small_file
from moe.system.sealed_folder import CONFIG, read_sums, sealed, sums, unsealed

LOCK = ".lock"
CHANGES = "changes.jsonl"
REPORT = "report.txt"

_RESUME = facts_of(Config, "resume")
#: Fields that do not change what is learnt: they may differ when a run is resumed.
FREE_FIELDS = tuple(name for name, fact in _RESUME.items() if fact == "free")
#: Fields that a run may change from its newest checkpoint on; each change is recorded in changes.jsonl.
CHANGEABLE_FIELDS = tuple(name for name, fact in _RESUME.items() if fact == "later")


class _Change(Fields):
    """A line of changes.jsonl: field → [old, new]."""

    step: Step
    changes: dict[str, Annotated[list[Any], pydantic.Field(min_length=2, max_length=2)]]


_CHANGE = pydantic.TypeAdapter(_Change)


@contextlib.contextmanager
def locked_workdir(workdir: epath.Path) -> Iterator[None]:
    """Hold the lock of an existing workdir; the kernel releases it however the process ends.

    In a multi-process run process 0 holds it. In a bucket, and on a file system without locks, nothing is held:
    concurrent runs are not detected there.

    Raises:
        ConfigError: another run holds it, or the workdir cannot be written.
    """
    if jax.process_index() != 0 or in_bucket(workdir):
        yield
        return
    # A soft lock would be left behind by a killed run.
    lock = filelock.FileLock(workdir / LOCK, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise ConfigError(f"--workdir={workdir}: another run uses it; wait for it, or use another workdir") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            reason = error.strerror or type(error).__name__
            if isinstance(error, PermissionError) and (workdir / LOCK).exists():
                reason += f": {LOCK} is another user's; delete it if nobody trains there"
            raise ConfigError(f"--workdir={workdir}: cannot be written ({reason})") from error
    try:
        yield
    finally:
        lock.release()


class Contents(enum.IntEnum):
    """Contents of a workdir; each value includes those before it."""

    NOTHING = 0
    #: config.json of a start that never trained a step: any config may reuse the workdir.
    CONFIG = 1
    #: Metrics of a run that was not yet saved.
    METRICS = 2
    CHECKPOINTS = 3

    @property
    def is_run(self) -> bool:
        """Whether a run in the workdir has something to lose."""
        return self >= Contents.METRICS


def contents(workdir: epath.Path) -> Contents:
    """Return the contents of a workdir.

    Raises:
        ConfigError: there are checkpoints without a config, the config is not a run's, or a run's checkpoints are gone.
    """
    steps = complete_steps(workdir)
    if not (workdir / CONFIG).exists():
        if steps:
            raise ConfigError(
                f"--workdir={workdir}: holds a checkpoint of step {steps[-1]} but no {CONFIG}; put that file back, or "
                "use another workdir"
            )
        return Contents.NOTHING
    if steps:
        return Contents.CHECKPOINTS
    config = read_config(workdir)  # a file that is not a run's config is never replaced
    last = max((row["step"] for row in iterate_rows(workdir / METRICS)), default=None)
    if last is None:
        return Contents.CONFIG
    # The second save waits for the first: rows beyond it prove that there was a checkpoint.
    if (workdir / REPORT).exists() or last > 2 * config.train.save_every:
        raise ConfigError(
            f"--workdir={workdir}: has metrics up to step {last} but no checkpoint; put checkpoints/ back, or delete "
            f"{METRICS} and {REPORT} to train again from step 0"
        )
    return Contents.METRICS


def is_finished(config: Config, workdir: epath.Path) -> bool:
    """Return True if the run has its last checkpoint and its report."""
    return (workdir / REPORT).exists() and config.train.num_steps in complete_steps(workdir)


def read_config(workdir: str | os.PathLike[str]) -> Config:
    """Read the config that a run or an import left beside its checkpoints.

    Raises:
        ConfigError: the file is missing or is not a config.
    """
    path = epath.Path(workdir) / CONFIG
    content = read_small_file(path)
    try:
        return from_workdir_dict(unsealed(content))
    except (ValueError, RecursionError) as error:  # not text, not JSON, or not a config
        raise ConfigError(f"{path}: {error}") from error


def write_config(config: Config, workdir: epath.Path, files: dict[str, bytes] | None = None) -> None:
    """Write the file of :func:`read_config`, with checksums.

    Args:
        config: of a run or a model.
        workdir: existing folder.
        files: name → content of the files beside it; None: they are those of the config that is replaced.
    """
    held = read_sums(workdir) if files is None else sums(files)
    write_atomic(workdir / CONFIG, sealed(json.loads(json.dumps(to_dict(config))), held))


def refuse_other_run(config: Config, workdir: epath.Path, *, allow_changes: bool = False) -> dict[str, list[Any]]:
    """Compare the config of the workdir's run with the given one.

    Args:
        config: of this start.
        workdir: holds a run.
        allow_changes: accept differences in :data:`CHANGEABLE_FIELDS`.

    Returns:
        field → [old, new] of the accepted changes.

    Raises:
        ConfigError: another field differs; all such fields are named. Or the workdir holds only the parameters of an
            import or an average.
    """
    theirs_config = read_config(workdir)
    theirs, ours = (json.loads(json.dumps(to_dict(tree))) for tree in (theirs_config, config))
    free = FREE_FIELDS
    if config.model.sent_precision != "none":  # rows for other hosts are rounded
        free = tuple(name for name in free if name != "model.moe.exchange_hosts")
    differing = {name: values for name, values in differing_settings(theirs, ours).items() if name not in free}
    if _same_function(theirs_config, config):
        differing.pop("model.moe.dispatch", None)
    changeable = {name: values for name, values in differing.items() if name in CHANGEABLE_FIELDS}
    if differing and not (allow_changes and changeable == differing):
        listed = "; ".join(
            f"{name} (there {old!r}, here {new!r})"
            for name, (old, new) in differing.items()
            if not (allow_changes and name in changeable)
        )
        change = ", or add --change to go on with the new values" if changeable == differing else ""
        raise ConfigError(
            f"--workdir={workdir}: holds a run with another config; use another workdir, or set back {listed}{change}"
        )
    if complete_steps(workdir) == [0]:  # a run saves its first checkpoint after its first step
        raise ConfigError(
            f"--workdir={workdir}: holds only the parameters of a model, as an import or an average does; to train "
            f"them, use another workdir and --config.start.checkpoint={workdir}"
        )
    return changeable


def _same_function(theirs: Config, ours: Config) -> bool:
    """True if the two dispatch modes compute the same: both have a capacity, or the capacity drops nothing."""
    if "dropless" not in (theirs.model.moe.dispatch, ours.model.moe.dispatch):
        return True
    moe = ours.model.moe
    size = moe.group_size or ours.data.sequence_length
    return all(layer_capacity(moe, size, train=train) >= size for train in (True, False))


def record_changes(config: Config, changes: dict[str, list[Any]], step: int, workdir: epath.Path) -> None:
    """Append changed fields to changes.jsonl and replace config.json; drop a record of a change that was not made.

    Args:
        config: with the new values.
        changes: result of :func:`refuse_other_run`.
        step: of the checkpoint that the run continues from.
        workdir: of the run.
    """
    if jax.process_index() != 0:
        return
    lines = _recorded(workdir)
    if changes:
        lines.append(json.dumps({"step": step, "changes": changes}).encode())
    text = b"".join(line + b"\n" for line in lines)
    path = workdir / CHANGES
    if text != (read_small_file(path) if path.exists() else b""):
        write_atomic(path, text)
    if changes:
        write_config(config, workdir)


def latest_change(workdir: epath.Path) -> int:
    """Step of the newest recorded change; 0: none. Raises ConfigError for a file that holds something else."""
    lines = _recorded(workdir)
    return _parse_change(lines[-1], workdir).step if lines else 0


def _recorded(workdir: epath.Path) -> list[bytes]:
    """Lines of changes.jsonl, without a last one whose values config.json does not have: the start that wrote it was
    killed before the change took effect. Raises ConfigError for a file that holds something else."""
    path = workdir / CHANGES
    lines = read_small_file(path).splitlines() if path.exists() else []
    changes = [_parse_change(line, workdir).changes for line in lines]
    if changes and (workdir / CONFIG).exists():
        values = flatten(json.loads(json.dumps(to_dict(read_config(workdir)))))
        if any(values.get(name, new) != new for name, (_, new) in changes[-1].items()):
            lines.pop()
    return lines


def _parse_change(line: bytes, workdir: epath.Path) -> _Change:
    return parse(line, _CHANGE, f"{workdir / CHANGES}: not a record of changes")


def write_run_files(config: Config, tokenizer_files: dict[str, bytes], workdir: epath.Path, *, new: bool) -> None:
    """Write the tokenizer, then the config.

    Args:
        config: of the run.
        tokenizer_files: name → content.
        workdir: existing folder.
        new: the workdir holds no run yet, and tokenizer files of a start that failed before its first step are deleted,
            as are recorded changes. Otherwise only missing tokenizer files are written, and the config while there is
            no checkpoint, so that it has the train.save_every of the latest start.

    Raises:
        ConfigError: a tokenizer file differs from this run's.
    """
    if jax.process_index() != 0:
        return
    if new and (workdir / CONFIG).exists():
        for name in set(TOKENIZER_FILES) - tokenizer_files.keys():  # one of them could be read in place of this run's
            if epath.Path(config.data.tokenizer) != workdir / name:  # which the user put there
                (workdir / name).unlink(missing_ok=True)
        (workdir / CHANGES).unlink(missing_ok=True)  # of a run whose checkpoints and rows were deleted
    for name, content in tokenizer_files.items():
        if new or not (workdir / name).exists():
            write_atomic(workdir / name, content)
        elif read_small_file(workdir / name) != content:
            raise ConfigError(
                f"{workdir / name}: differs from the tokenizer of this config and its data; if the file was damaged, "
                "delete it to have it restored; if the data changed, use another workdir"
            )
    if new or not complete_steps(workdir):
        write_config(config, workdir, tokenizer_files)


@contextlib.contextmanager
def disk_errors(workdir: epath.Path) -> Iterator[None]:
    """Turn errors of a full, read-only or failing disk or bucket into ConfigError with the step to continue from."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not is_bucket_error(error):
            raise
        reason, name = getattr(error, "strerror", None) or error, getattr(error, "filename", None) or "while writing"
        # A bucket that refuses to be written may refuse to be listed too.
        last = "its newest checkpoint" if in_bucket(workdir) else f"step {max(complete_steps(workdir), default=0)}"
        raise ConfigError(
            f"--workdir={workdir}: {reason} ({name}); once that is fixed, the same command continues from {last}"
        ) from error


def differing_settings(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, list[Any]]:
    """Dotted name → [their value, ours] of the settings in which the sections of two configs differ, in alphabetical
    order; where the gates differ, only their names, last, since the fields follow from them."""
    theirs, ours = flatten(theirs), flatten(ours)
    names = sorted({*theirs, *ours})
    differing = {name: [theirs.get(name), ours.get(name)] for name in names if theirs.get(name) != ours.get(name)}
    if gates := differing.pop("model.moe.gate.name", None):
        differing = {name: values for name, values in differing.items() if not name.startswith("model.moe.gate.")}
        differing["model.moe.gate"] = gates
    return differing


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict as {dotted name: value}."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
