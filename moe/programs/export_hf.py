"""Export a checkpoint for open-source libraries: moe export --workdir=WORKDIR --out=DIR

DIR gets config.json, safetensors files and the tokenizer. Tensors keep the dtype of the checkpoint (float32 for a run,
that of the imported files for an import) unless --dtype is given; --quantized writes FP8 where the import had it;
--adapters writes only the low-rank adapters, for PEFT.
"""

from pathlib import Path

from absl import flags

from moe.programs import cli

_WORKDIR = cli.define_path("workdir", "Folder of a run or an import.")
_OUT = cli.define_path("out", "Folder to write.")
_TYPE = flags.DEFINE_string(
    "model_type", "", "Family to write; empty: the import's, or the first that can express the model."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "", ["", "float32", "bfloat16", "float16"], "Type to cast to; empty: keep the stored one."
)
_LAYOUT = flags.DEFINE_enum(
    "layout", "per_expert", ["per_expert", "fused"], "Three tensors for each expert, or two for all experts of a layer."
)
_ADAPTERS = flags.DEFINE_bool("adapters", False, "Write only the adapters of a run with lora.rank, in PEFT's layout.")
_QUANTIZED = flags.DEFINE_bool("quantized", False, "Write FP8 blocks where the import had them.")


def main() -> None:
    """Export the workdir and list the files written."""
    from moe.config import ConfigError
    from moe.interop import export_checkpoint
    from moe.interop.peft import export_adapters

    if _ADAPTERS.value:
        if _DTYPE.value or _QUANTIZED.value or _LAYOUT.value == "fused":
            raise ConfigError("--adapters: must be given without --dtype, --layout=fused and --quantized")
        export_adapters(str(_WORKDIR.value), str(_OUT.value), model_type=str(_TYPE.value))
        _list_files()
        return
    export_checkpoint(
        str(_WORKDIR.value),
        str(_OUT.value),
        model_type=str(_TYPE.value),
        dtype=str(_DTYPE.value),
        fused=_LAYOUT.value == "fused",
        quantized=bool(_QUANTIZED.value),
    )
    _list_files()


def _list_files() -> None:
    print(f"{_OUT.value}: {', '.join(sorted(path.name for path in Path(str(_OUT.value)).iterdir()))}")


def run() -> None:
    """The program."""
    cli.run(
        main,
        required=("workdir", "out"),
        examples=(
            "moe export --workdir=/tmp/lora --out=/tmp/adapters --adapters",
            "moe export --workdir=/tmp/quickstart --out=/tmp/exported",
            "moe export --workdir=/tmp/imported --out=/tmp/exported --dtype=bfloat16 --layout=fused",
        ),
    )
