"""The program of a worker: list its blocks, or run the jobs of a file; needs NumPy alone.

    python transformers_blocks.py --list
    python transformers_blocks.py JOBS.json

``--list`` prints the library's version and what each block claims. A job names a block, a file of arrays to read and
one to write (:mod:`moe.conformance.peers.suite`).
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def lines(adapter: Any, job: dict[str, Any]) -> str:
    """Lines that make a block with its library alone, and its losses where the job differentiates one."""
    code = adapter.code(job["k"])
    return f"{code}\n{adapter.losses(job['k'])}" if job["balance"] or job["z"] else code


def start(adapter: Any, job: dict[str, Any], **names: Any) -> dict[str, Any]:
    """Names after the block's lines, which find its settings in ``given`` as its script does."""
    scope = names | {"json": json, "np": np, "given": {"settings": np.array(adapter.given(job["k"]))}}
    exec(lines(adapter, job), scope)
    return scope


def run(version: str, adapters: Mapping[str, Any], measure: Callable[[Any, dict[str, Any], Arrays], Arrays]) -> None:
    """Answer the command line.

    Args:
        version: of the library and of its framework.
        adapters: block → an object with ``claims()``, ``given(k)``, ``code(k)`` and ``losses(k)``.
        measure: adapter, job and arrays of a case → results.
    """
    if sys.argv[1] == "--list":
        claims = {name: adapter.claims() for name, adapter in adapters.items()}
        print(json.dumps({"version": version, "blocks": claims}))
        return
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    for job in jobs:
        adapter = adapters[job["block"]]
        with np.load(job["arrays"]) as archive:
            arrays = dict(archive)
        try:
            with open(job["out"] + ".code", "w") as file:
                file.write(lines(adapter, job))
            with open(job["out"] + ".json", "w") as file:
                json.dump(adapter.given(job["k"]), file)
            np.savez(job["out"] + ".npz", **measure(adapter, job, arrays))
        except Exception as error:
            with open(job["out"] + ".txt", "w") as file:
                file.write(f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}")
