"""Import an open checkpoint: moe import --source=DIR --out=WORKDIR

DIR holds config.json and safetensors files, sharded or not. WORKDIR gets config.json, checkpoints/0 and the tokenizer;
generate, evaluate, fine-tune or export from there. One tensor at a time is in memory. Quantised weights (FP8 blocks,
MXFP4, packed INT4) become floats of --dtype.
"""

from absl import flags

from moe.programs import cli

_SOURCE = cli.define_path("source", "Folder with config.json and safetensors, or org/name in Hugging Face's cache.")
_OUT = cli.define_path("out", "Workdir to create.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Type of activations, matmuls and dequantised weights."
)
_PREDICTION = flags.DEFINE_bool("prediction", False, "Also import the layers of multi-token prediction.")


def main() -> None:
    """Import the folder and print the parameter counts."""
    from moe.interop import import_checkpoint
    from moe.interop.hub_cache import find_source
    from moe.models.flops import count_parameters

    source, out = find_source(str(_SOURCE.value)), str(_OUT.value)
    config = import_checkpoint(source, out, dtype=_DTYPE.value, prediction=bool(_PREDICTION.value))
    total, active = count_parameters(config.model)
    print(f"{_OUT.value}: {total:,} parameters, {active:,} active per token")


def run() -> None:
    """The program."""
    cli.run(
        main,
        required=("source", "out"),
        examples=(
            "moe import --source=/path/to/Mixtral-8x7B-v0.1 --out=/tmp/imported",
            "moe import --source=allenai/OLMoE-1B-7B-0924 --out=/tmp/olmoe --dtype=bfloat16",
        ),
    )
