"""Prove the MoE layer against the papers' equations and other implementations, and write the table.

Takes some minutes on two CPU cores. Exits with 1 if a row fails. --layers names a folder of npz files, each one layer
of another library with its weights, input and output (moe.interop.layers.run_reference reads them); without it these
rows are left out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import flags

from moe.programs import cli
from moe.system import process
from moe.system.atomic_files import write_atomic

_LAYERS = cli.define_path("layers", "Folder of npz files of other libraries' layers.")
_OUT = flags.DEFINE_string("out", "docs/results/conformance.md", "Table to write.")


def main() -> None:
    """Print rows as they are measured and write the table; the exit status says whether all passed."""
    from moe.config import ConfigError

    layers, out = Path(_LAYERS.value) if _LAYERS.value else None, Path(_OUT.value)
    if layers and not any(layers.glob("*.npz")):
        raise ConfigError(f"--layers={layers}: holds no npz files")
    if not os.access(out.parent, os.W_OK) or out.is_dir():
        raise ConfigError(f"--out={out}: must be a file in a folder that exists and can be written")
    from moe.conformance import table  # takes seconds to import

    rows = []
    if not layers:
        print("no layers of other libraries: --layers=FOLDER names npz files of them")
    for row in table.run(layers):
        rows.append(row)
        print(f"{'ok   ' if row.passes else 'FAILS'} {row.what}: {row.measured}, expected {row.expected}", flush=True)
    write_atomic(out, table.page(rows))
    failed = sum(not row.passes for row in rows)
    print(f"{len(rows)} rows, {failed} failed; {out}")
    sys.exit(int(failed > 0))


def _use_fake_devices() -> None:
    """Have eight CPU devices, and fast compilation: most of the time goes into programs that run once."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    given = os.environ.get("XLA_FLAGS", "")
    own = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    own += [] if "device_count" in given else ["--xla_force_host_platform_device_count=8"]
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *own])


if __name__ == "__main__":
    process.prepare()  # before JAX is imported; may restart this program
    _use_fake_devices()
    cli.run(
        main,
        examples=(
            "python scripts/conformance.py",
            "python scripts/conformance.py --layers=/tmp/layers --out=/tmp/conformance.md",
        ),
    )
