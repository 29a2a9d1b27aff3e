"""python scripts/export_hf.py --workdir=WORKDIR --out=DIR: a checkpoint of ours becomes an open one.

DIR gets config.json, safetensors files and the tokenizer. Tensors keep the dtype of the checkpoint: float32 for a run
of ours, an imported file's own for an import, unless --dtype says otherwise.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe import platform

if __name__ == "__main__":
    platform.use_allocator()  # before JAX: it restarts this program once

from absl import flags

from moe import cli

_WORKDIR = cli.define_path("workdir", "Folder of a run or an import.")
_OUT = cli.define_path("out", "Folder to write.")
_TYPE = flags.DEFINE_string("model_type", "", "Architecture to write it as; empty: the first that can say it.")
_DTYPE = flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16", "float16"], "To cast to; empty: as stored.")


def main() -> None:
    """Flags in, a folder out."""
    from moe.interop import export_checkpoint

    export_checkpoint(str(_WORKDIR.value), str(_OUT.value), model_type=str(_TYPE.value), dtype=str(_DTYPE.value))
    print(f"{_OUT.value}: {', '.join(sorted(path.name for path in Path(str(_OUT.value)).iterdir()))}")


if __name__ == "__main__":
    cli.run(main, required=("workdir", "out"))
