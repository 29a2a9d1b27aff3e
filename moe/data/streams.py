"""A batch is made of n streams, whoever runs them: rows do not depend on the number of processes.

In: n datasets, each giving its own slice of every batch. Out: one iterator over those that this process runs, read
ahead by one thread, and its state as one small JSON file per stream, which any later process can take up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import grain
import grain.checkpoint
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from moe.atomic_files import from_checked_json, to_checked_json
from moe.config import ConfigError

READ_AHEAD = 2  # batches made before they are asked for


def run(streams: Mapping[int, grain.IterDataset], documents: str) -> grain.IterDataset:
    """The dataset of these streams' parts of each batch, in the order of their numbers.

    Args:
      streams: by number; each gives dicts of arrays, one per batch.
      documents: a digest of what the streams read; a state saved over other documents is refused.
    """
    return grain.experimental.ThreadPrefetchIterDataset(
        _Streams(dict(sorted(streams.items())), documents), prefetch_buffer_size=READ_AHEAD
    )


class _Streams(grain.IterDataset):
    def __init__(self, streams: dict[int, grain.IterDataset], documents: str):
        super().__init__(list(streams.values()))
        self._streams, self._documents = streams, documents

    def __iter__(self) -> grain.DatasetIterator:
        return _StreamsIterator({number: iter(stream) for number, stream in self._streams.items()}, self._documents)


class _StreamsIterator(grain.DatasetIterator):
    def __init__(self, iterators: dict[int, grain.DatasetIterator], documents: str):
        super().__init__(list(iterators.values()))
        self._iterators, self._documents = iterators, documents

    def __next__(self) -> dict[str, np.ndarray]:
        parts = [next(iterator) for iterator in self._iterators.values()]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def get_state(self) -> dict[str, Any]:
        return {
            str(number): {"documents": self._documents, "position": iterator.get_state()}
            for number, iterator in self._iterators.items()
        }

    def set_state(self, state: dict[str, Any]) -> None:
        for number, iterator in self._iterators.items():
            saved = state[str(number)]
            if saved["documents"] != self._documents:
                raise ConfigError(
                    "data.dataset: its documents, or the tokenizer, are not those of the checkpoint; put them back, or "
                    "start another workdir"
                )
            iterator.set_state(saved["position"])


class ExactState(grain.IterDataset):
    """Rows of ConcatThenSplitIterDataset, whose state survives JSON.

    Grain 0.2.18 saves iterators as JSON, which returns the tuple (-1, -1) as a list; ConcatThenSplitIterDataset then
    no longer sees that it stands between two documents, and skips one. Harmless once that is mended.
    """

    def __iter__(self) -> grain.DatasetIterator:
        return _ExactStateIterator(iter(self._parent))


class _ExactStateIterator(grain.DatasetIterator):
    def __next__(self) -> Any:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        slices = {key: tuple(value) for key, value in state["remainder_slices"].items()}
        self._parent.set_state({**state, "remainder_slices": slices})


class WindowShuffle(grain.IterDataset):
    """Endless rows in the order of a permutation of every `window` of them.

    Grain's own takes a third of a millisecond a row for windows of 64: it permutes by cycle-walking in a larger domain.
    """

    def __init__(self, parent: grain.IterDataset, window: int, seed: int):
        super().__init__(parent)
        self._window, self._seed = window, seed

    def __iter__(self) -> grain.DatasetIterator:
        return _WindowShuffleIterator(iter(self._parent), self._window, self._seed)


class _WindowShuffleIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, window: int, seed: int):
        super().__init__(parent)
        self._window, self._seed = window, seed
        self._number, self._taken, self._rows = -1, window, []
        self._start = parent.get_state()  # of the parent, before the window's first row

    def __next__(self) -> Any:
        if self._taken == self._window:
            self._number, self._taken, self._start = self._number + 1, 0, self._parent.get_state()
            self._fill()
        self._taken += 1
        return self._rows.pop()

    def _fill(self) -> None:
        rows = [next(self._parent) for _ in range(self._window)]
        order = np.random.default_rng([self._seed, self._number]).permutation(self._window)
        self._rows = [rows[i] for i in order]

    def get_state(self) -> dict[str, Any]:
        return {"start": self._start, "window": self._number, "taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._start, self._number, self._taken = state["start"], state["window"], state["taken"]
        self._parent.set_state(self._start)
        if self._number >= 0:
            self._fill()
            del self._rows[self._window - self._taken :]


# --- In a checkpoint -------------------------------------------------------------------------------------------------
class StreamsHandler(grain.checkpoint.CheckpointHandler):
    """Grain's own keeps one file per process, which another number of processes could not read."""

    def save(self, directory: epath.Path, item: Any = None, args: Any = None) -> None:
        """Writes the iterator's state, a file a stream."""
        for number, state in (item or args.item).get_state().items():
            (directory / f"stream_{number}.json").write_text(to_checked_json(state))

    def restore(self, directory: epath.Path, item: Any = None, args: Any = None) -> Any:
        """Moves the iterator to its place, and returns it."""
        iterator = item or args.item
        files = {number: directory / f"stream_{number}.json" for number in iterator.get_state()}
        iterator.set_state({number: from_checked_json(file.read_text()) for number, file in files.items()})
        return iterator


@ocp.args.register_with_handler(StreamsHandler, for_save=True)  # pyright: ignore[reportArgumentType]
@dataclasses.dataclass
class StreamsSave(ocp.args.CheckpointArgs):
    """The state of an iterator over :func:`run`, in a file per stream."""

    item: grain.DatasetIterator


@ocp.args.register_with_handler(StreamsHandler, for_restore=True)  # pyright: ignore[reportArgumentType]
@dataclasses.dataclass
class StreamsRestore(ocp.args.CheckpointArgs):
    """Moves a fresh iterator over the same documents to the saved place; FileNotFoundError for a missing stream."""

    item: grain.DatasetIterator
