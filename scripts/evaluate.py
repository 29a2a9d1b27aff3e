"""python scripts/evaluate.py --workdir=WORKDIR: perplexity and bits per byte of a checkpoint, per domain of a corpus.

WORKDIR is of a run or an import; the corpus is the run's own unless --dataset or --domains name another that is
prepared. Bits per byte compare models of different tokenizers; perplexity is per token of the model's own.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe import platform

if __name__ == "__main__":
    platform.use_huge_pages()  # before JAX: it restarts this program once

import dataclasses
import json

from absl import flags

from moe import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run or an import.")
_STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; the newest if not given.")
_DATASET = flags.DEFINE_string("dataset", None, "data.dataset instead of the workdir's.")
_DOMAINS = flags.DEFINE_list("domains", None, "data.domains instead of the workdir's.")
_DIRECTORY = flags.DEFINE_string("directory", None, "data.directory instead of the workdir's.")
_LENGTH = flags.DEFINE_integer("sequence_length", None, "Tokens per row instead of the workdir's.")
_ROWS = flags.DEFINE_integer("rows", None, "Rows per domain instead of the workdir's data.heldout_rows.")
_BATCH = flags.DEFINE_integer("batch_size", None, "Rows at once instead of the workdir's.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON, with what the routers did.")


def main() -> None:
    """Flags in, a table out."""
    import jax

    from moe import checkpoint, evaluate, sharding
    from moe.config import MeshConfig, from_config_dict, to_dict, validate_mesh
    from moe.data import pipeline
    from moe.data.json_tokenizer import find_tokenizer
    from moe.step import build

    workdir = str(_WORKDIR.value)
    tree = to_dict(checkpoint.read_config(workdir))
    given = {
        ("data", "dataset"): _DATASET.value,
        ("data", "domains"): _DOMAINS.value,
        ("data", "directory"): _DIRECTORY.value,
        ("data", "sequence_length"): _LENGTH.value,
        ("data", "heldout_rows"): _ROWS.value,
        ("train", "batch_size"): _BATCH.value,
    }
    for (section, name), value in given.items():
        if value is not None:
            tree[section][name] = value
    if _DOMAINS.value is not None:
        tree["data"]["weights"] = ()
    tree["train"]["accumulation_steps"] = 1
    # A checkpoint fits any mesh: here rows are split, and parameters where the run split them.
    config = dataclasses.replace(from_config_dict(tree), mesh=MeshConfig(data=1, fsdp=-1))
    mesh = sharding.make_mesh(config.mesh)
    validate_mesh(config, mesh.shape)
    prepared = pipeline.prepare(config.data, config.model.vocab_size, tokenizer=find_tokenizer(workdir))
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        variables = checkpoint.read_variables(workdir, config.model, mesh, step=_STEP.value)
        results = evaluate.evaluate(program, variables, evaluate.load_heldout(program, prepared))
    if _JSON.value:
        print(json.dumps(results, indent=2))
        return
    print(f"{'domain':<24}{'nats/token':>12}{'perplexity':>12}{'bits/byte':>12}{'tokens':>12}")
    for domain, row in results.items():
        print(
            f"{domain:<24}{row['loss']:>12.4f}{row['perplexity']:>12.2f}{row['bits_per_byte']:>12.4f}"
            f"{row['targets']:>12,}"
        )


if __name__ == "__main__":
    cli.run(main, required=("workdir",))
