"""MaxText's train step, compiled by its own compile-only program for a slice that is absent.

maxtext_step.py FILE NAME=VALUE...: the names are MaxText's settings. FILE becomes a compressed record of the compiled
program's text, its memory, and the places of the devices in the order of its mesh.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# No TPU is here, and none is waited for.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "DECOUPLE_GCLOUD": "TRUE"}

from maxtext.configs import pyconfig
from maxtext.trainers.pre_train import train_compile

MEMORY = ("argument", "output", "alias", "temp", "generated_code", "host_temp", "host_argument")


def main(path: Path, settings: list[str]) -> None:
    """Compile, and write the record."""
    kept: dict[str, Any] = {}
    compile_step = train_compile.jit_and_compile

    def keep(function: Any, inputs: Any, keywords: Any, mesh: Any, *rest: Any) -> Any:
        start = time.perf_counter()
        compiled = compile_step(function, inputs, keywords, mesh, *rest)
        memory = compiled.memory_analysis()
        kept["text"] = compiled.as_text()
        kept["memory"] = {name: getattr(memory, f"{name}_size_in_bytes", 0) for name in MEMORY}
        kept["peak"] = getattr(memory, "peak_memory_in_bytes", 0)
        kept["coords"] = [list(device.coords) for device in mesh.devices.flat]
        kept["seconds"] = time.perf_counter() - start
        return compiled

    train_compile.jit_and_compile = keep
    base = pyconfig.__file__.replace("pyconfig.py", "base.yml")
    train_compile.main(["", base, "compile_topology_num_slices=1", *settings])
    names = "maxtext", "jax", "jaxlib", "libtpu"
    kept["versions"] = [f"{name} {importlib.metadata.version(name)}" for name in names]
    temporary = path.with_suffix(".part")
    temporary.write_bytes(gzip.compress(json.dumps(kept).encode()))
    temporary.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
