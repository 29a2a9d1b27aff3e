"""Arrays of checkpoints in a bucket, with limits on TensorStore's requests: a save or a restore cannot hang."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore

#: Retries of a request that a bucket answers with 429 or 5xx, about a minute in all. TensorStore's default, 32 retries,
#: takes a quarter of an hour, silently.
RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "16s"}
#: Connecting for 30 s without success, or moving less than a byte a second for a minute, counts as such an answer.
_CURL = {"CONNECT_TIMEOUT_SECONDS": "30", "LOW_SPEED_TIME_SECONDS": "60", "LOW_SPEED_LIMIT_BYTES": "1"}


class _BoundedArrays(ocp.type_handlers.ArrayHandler):
    """Orbax's handler of jax.Array under :data:`RETRIES`, for which Orbax has no setting."""

    async def serialize(self, values: Any, infos: Sequence[Any], args: Any = None) -> Any:
        return await super().serialize(values, _bounded(infos), args)

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Any:
        return await super().deserialize(_bounded(infos), args)

    async def metadata(self, infos: Sequence[Any]) -> Any:
        return await super().metadata(_bounded(infos))


def _bounded(infos: Sequence[Any]) -> Sequence[Any]:
    """Replace contexts in array descriptions by ones that inherit from them; one per old one, as each has a cache."""
    contexts: dict[int, tensorstore.Context] = {}
    for info in infos:
        own = info.ts_context
        if id(own) not in contexts:
            contexts[id(own)] = tensorstore.Context({"gcs_request_retries": RETRIES}, own)
        info.ts_context = contexts[id(own)]
    return infos


#: GB of a read that Orbax may have in the host's memory at once, where arrays stay there. Its default, 96, is for those
#: that go on to devices, and refuses a larger array: the experts of Mixtral 8x22B have 180 GB in float32.
_TO_HOST_GB = 10**6


def array_handler(*, to_host: bool = False) -> ocp.PyTreeCheckpointHandler:
    """The handler of a tree of arrays, such as a TrainState.

    Args:
        to_host: arrays are read whole into the host's memory.
    """
    for name, value in _CURL.items():
        os.environ.setdefault(f"TENSORSTORE_CURL_{name}", value)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, _BoundedArrays()))
    limit = _TO_HOST_GB if to_host else None
    # zstd saves a tenth of the size for four times the CPU time.
    return ocp.PyTreeCheckpointHandler(
        use_compression=False, type_handler_registry=registry, restore_concurrent_gb=limit
    )
