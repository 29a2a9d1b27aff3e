"""Writers of metrics besides the JSON lines: TensorBoard, Weights & Biases, or a user's ``module:function``."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter

from moe.config.references import import_object
from moe.routing.balancing import AUXILIARY
from moe.system.atomic_files import in_bucket, write_atomic
from moe.system.fields import ConfigError, raised_as_errors
from moe.system.metrics_files import Factory

#: Kinds of rows whose values are shown for every layer, and the beginning of their tags.
_LAYER_KINDS = {"train": "", "heldout/all": "heldout_"}
_OPTIMIZER = ("learning_rate", "gradient_norm", "skipped")
_CONSTANTS = ("targets",)
#: Values per layer that equal K in every row with most gates.
_OFTEN_CONSTANT = ("active_experts",)


def _without_weight(config: dict[str, Any]) -> set[str]:
    """Names that are not shown: losses with weight 0, and numbers that are the same in every row."""
    losses = config.get("model", {}).get("moe", {}).get("losses", {})
    return {loss for loss, (weight, _) in AUXILIARY.items() if losses.get(weight) == 0} | set(_CONSTANTS)


def _tag(kind: str, name: str) -> str:
    """Group and name of a scalar, such as loss/heldout_python."""
    if kind == "timing":
        return f"speed/{name}"
    if kind == "train":
        return f"optimizer/{name}" if name in _OPTIMIZER else f"loss/{name}"
    if name == "loss":
        return f"loss/{_flat(kind)}"
    return f"loss_heldout/{name}_{_flat(kind.removeprefix('heldout/'))}"


def _flat(kind: str) -> str:
    """Name of a kind of rows without slashes, which TensorBoard would show as groups."""
    return kind.replace("/", "_")


#: Bytes from which a bucket gets another event file, since every copy is of the whole file.
_LARGEST_EVENTS = 1 << 24
#: Name of an event file, with the second in which it was begun.
_EVENTS = re.compile(r"events\.out\.tfevents\.(\d{1,15})\.")


class TensorBoard:
    """Writer of event files to ``tensorboard/``: scalars, loads of the experts as histograms, the config as text.

    TensorBoard's files are appended to, which a bucket cannot do: there the newest is copied, once a minute and at the
    end. Events are written by the thread of the caller, which gets the error of a full disk:
    SummaryWriter of tensorboardX would wait for ever for its thread, which such an error ends.
    """

    def __init__(self, workdir: epath.Path, config: dict[str, Any], step: int):
        self._folder = workdir / "tensorboard"
        self._local = tempfile.TemporaryDirectory() if in_bucket(workdir) else None
        self._copied = time.monotonic()
        self._shown: set[str] = set()
        self._first: dict[tuple[str, str], list[float]] = {}
        self._ignored = _without_weight(config)
        if not self._local:
            self._folder.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []
        self._second = max((int(found[1]) for found in map(_EVENTS.match, names) if found), default=0)
        self._events = self._new_file()
        start = SessionLog(status=SessionLog.START)
        self._add(step + 1, session_log=start)  # hides rows that will be written again
        text = json.dumps(config, indent=2).replace("\n", "\n    ")
        self._add(step, summary=summary.text("config", f"    {text}"))  # indented: a block of code in Markdown

    def _new_file(self) -> RecordWriter:
        """Another event file, with the version of its format, named after those that are there: TensorBoard reads them
        in the order of their names, and a clock may be set back."""
        folder = self._local.name if self._local else os.fspath(self._folder)
        self._second = max(int(time.time()), self._second + 1)
        name = f"events.out.tfevents.{self._second}.{socket.gethostname()}"
        file = RecordWriter(os.path.join(folder, name))
        version = Event(wall_time=time.time(), file_version="brain.Event:2")
        file.write(version.SerializeToString())
        return file

    def _add(self, step: int, **content: Any) -> None:
        """Write an event."""
        self._events.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Write a row in groups that TensorBoard shows in alphabetical order: loss, optimizer, routing, speed.

        Values per layer are shown as their mean, in ``routing``, and one by one in a group for each name. Losses whose
        weight is 0, numbers that were 0 in every row so far, and an unchanged number of active experts are left out.
        """
        for name, value in values.items():
            if isinstance(value, str):
                self._add(step, summary=summary.text(f"{kind}/{name}", value))
            elif kind == "warning" or name in self._ignored:
                continue
            elif np.ndim(value) == 0:
                self._add_scalar(_tag(kind, name), float(value), step)
            elif np.ndim(value) == 1:
                self._add_layers(kind, name, np.asarray(value), step)
            elif np.ndim(value) == 2 and kind in _LAYER_KINDS:
                for layer, numbers in enumerate(value):
                    self._add_bars(
                        f"routing_layers_{name}/{_LAYER_KINDS[kind]}layer_{layer}", np.asarray(numbers), step
                    )
        self._events.flush()
        if self._local and time.monotonic() > self._copied + 60:
            self._copy(self._local.name)

    def _add_layers(self, kind: str, name: str, values: np.ndarray, step: int) -> None:
        if name in _OFTEN_CONSTANT and self._first.setdefault((kind, name), values.tolist()) == values.tolist():
            return
        self._add_scalar(f"routing/{name}{'' if kind == 'train' else f'_{_flat(kind)}'}", float(values.mean()), step)
        if kind in _LAYER_KINDS and len(values) > 1:
            for layer, number in enumerate(values):
                self._add_scalar(f"routing_layers_{name}/{_LAYER_KINDS[kind]}layer_{layer}", float(number), step)

    def _add_scalar(self, tag: str, value: float, step: int) -> None:
        if value or tag in self._shown:
            self._shown.add(tag)
            self._add(step, summary=summary.scalar(tag, value))

    def _copy(self, local: str) -> None:
        for path in Path(local).iterdir():
            large = path.stat().st_size > _LARGEST_EVENTS
            if large:
                self._events.close()
            write_atomic(self._folder / path.name, path.read_bytes())
            if large:
                path.unlink()
                self._events = self._new_file()
        self._copied = time.monotonic()

    def _add_bars(self, tag: str, heights: np.ndarray, step: int) -> None:
        """Histogram whose i-th bin is expert i."""
        edges = np.arange(len(heights) + 1, dtype=float)
        total, centers = float(heights.sum()), edges[:-1] + 0.5
        bars = summary.histogram_raw(
            tag,
            min=0.0,
            max=float(len(heights)),
            num=total,
            sum=float((heights * centers).sum()),
            sum_squares=float((heights * centers**2).sum()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=heights.tolist(),
        )
        self._add(step, summary=bars)

    def close(self) -> None:
        """Close the event file."""
        with self._local or contextlib.nullcontext():
            self._events.close()
            if self._local:
                self._copy(self._local.name)


class WeightsAndBiases:
    """Writer to Weights & Biases (``pip install wandb``): offline, to ``wandb/``, unless WANDB_MODE is set."""

    def __init__(self, workdir: epath.Path, config: dict[str, Any], step: int):
        del step  # wandb ignores rows that it already has
        try:
            import wandb  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError("train.writers='wandb': needs the package wandb; install it with pip") from error
        self._histogram = wandb.Histogram
        self._run = wandb.init(
            dir="." if in_bucket(workdir) else os.fspath(workdir),
            project="moe",
            name=workdir.name,
            id=hashlib.sha256(os.fspath(workdir).encode()).hexdigest()[:16],  # a resumed run continues
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=config,
        )

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Log numbers, [L] as a number per layer, [L,E] as a histogram over the experts per layer."""
        logged: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, str) or np.ndim(value) == 0:
                logged[f"{kind}/{name}"] = value
            elif kind != "warning":
                for layer, entry in enumerate(value):
                    bars = (np.asarray(entry), np.arange(np.size(entry) + 1))
                    logged[f"{kind}/{name}/{layer}"] = self._histogram(np_histogram=bars) if np.ndim(entry) else entry
        self._run.log(logged, step=step)

    def close(self) -> None:
        """Finish the run in Weights & Biases."""
        self._run.finish()


class Trackio(WeightsAndBiases):
    """Writer to Trackio (``pip install trackio``), Hugging Face's: local, unless TRACKIO_SPACE_ID names a Space.

    Its runs and histograms are called as those of Weights & Biases; ``trackio show`` opens the pages.
    """

    def __init__(self, workdir: epath.Path, config: dict[str, Any], step: int):
        del step  # a run of the same name is continued
        try:
            import trackio  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError("train.writers='trackio': needs the package trackio; install it with pip") from error
        self._histogram = trackio.Histogram
        self._run = trackio.init(
            project="moe",
            name=f"{workdir.name}-{hashlib.sha256(os.fspath(workdir).encode()).hexdigest()[:8]}",
            resume="allow",
            space_id=os.environ.get("TRACKIO_SPACE_ID"),
            config=config,
        )


#: One entry per name that train.writers may have, beside module:function.
WRITERS: dict[str, Factory] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}


def find_writers(names: Sequence[str]) -> list[Factory]:
    """Factories of ``train.writers``.

    Raises:
        ConfigError: an unknown name, or a module or function that cannot be imported.
    """
    found = []
    for name in names:
        if ":" not in name and name not in WRITERS:
            raise ConfigError(f"train.writers={name!r}: must be one of {', '.join(WRITERS)}, or module:function")
        factory: Any = import_object("train.writers", name) if ":" in name else WRITERS[name]
        if not (callable(factory) and _takes(factory, 3)):
            raise ConfigError(f"train.writers={name!r}: must be a function (workdir, config, step) -> writer")
        found.append(functools.partial(_OwnWriter, f"train.writers={name!r}", factory) if ":" in name else factory)
    return found


class _OwnWriter:
    """A writer from a user's module; its errors become ConfigErrors that name it."""

    def __init__(self, where: str, factory: Callable[..., Any], workdir: epath.Path, config: dict[str, Any], step: int):
        self._where = where
        self._writer: Any = self._call("it", factory, workdir, config, step)
        if not all(callable(getattr(self._writer, name, None)) for name in ("write", "close")):
            kind = type(self._writer).__name__
            raise ConfigError(f"{where}: must return a writer with write(step, kind, values) and close(), not {kind}")

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        with raised_as_errors(f"{self._where}: {what}"):
            return function(*arguments)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Pass a row on."""
        self._call("write", self._writer.write, step, kind, values)

    def close(self) -> None:
        """Close it."""
        self._call("close", self._writer.close)


def _takes(function: Callable[..., Any], count: int) -> bool:
    """False if a function cannot be called with that many arguments; True for functions in C without a signature."""
    try:
        inspect.signature(function).bind(*range(count))
    except (TypeError, ValueError) as error:
        return isinstance(error, ValueError)
    return True
