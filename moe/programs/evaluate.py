"""Held-out perplexity and bits per byte of a checkpoint, per domain: moe evaluate --workdir=WORKDIR.

WORKDIR belongs to a run or an import. The corpus is the run's own unless --dataset or --domains name another prepared
one.
Perplexity is per token of the model's own tokenizer; bits per byte compare models with different tokenizers.
"""

import json
from typing import Any

from absl import flags

from moe.programs import cli

_WORKDIR = cli.WorkdirFlags()
_ROWS = flags.DEFINE_integer("rows", None, "Rows per domain instead of the workdir's data.heldout_rows.")
_EVAL_K = flags.DEFINE_integer(
    "eval_k", None, "K of a model whose K was drawn in training (gate matryoshka) instead of the workdir's."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other processes, for a model that one host cannot hold."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON, which includes statistics of the routers.")


def main() -> None:
    """Parse flags, evaluate and print."""
    import jax

    from moe.parallel.mesh import join_processes
    from moe.system import signals

    if _DISTRIBUTED.value:
        join_processes()
    with signals.ended_together():
        results = _evaluate()
    if jax.process_index() == 0:
        _show(results)


def _evaluate() -> dict[str, Any]:
    """Metrics of each domain."""
    import jax

    from moe.checkpoints.pinned import agreed
    from moe.training import evaluation
    from moe.training.agreement import refuse_other_inputs
    from moe.training.open_workdir import open_workdir

    own = {("data", "heldout_rows"): _ROWS.value, ("model.moe.gate", "eval_k"): _EVAL_K.value}
    opened = open_workdir(_WORKDIR.path, _WORKDIR.instead | own)
    program = opened.program
    refuse_other_inputs(program.config, opened.prepared)
    with jax.set_mesh(program.mesh):
        heldout = evaluation.load_heldout(program, opened.prepared)
        variables = opened.variables(agreed(opened.step_or_newest(_WORKDIR.step)))
        return evaluation.evaluate(program, variables, heldout)


def _show(results: dict[str, Any]) -> None:
    if _JSON.value:
        print(json.dumps(results, indent=2))
        return
    print(f"{'domain':<24}{'nats/token':>12}{'± s.e.':>10}{'perplexity':>12}{'bits/byte':>12}{'tokens':>12}")
    for domain, row in results.items():
        error = f"{row['standard_error']:.4f}" if "standard_error" in row else "–"
        print(
            f"{domain:<24}{row['loss']:>12.4f}{error:>10}{row['perplexity']:>12.2f}{row['bits_per_byte']:>12.4f}"
            f"{row['targets']:>12,}"
        )


def run() -> None:
    """The program."""
    cli.run(
        main,
        required=("workdir",),
        examples=(
            "moe evaluate --workdir=/tmp/quickstart",
            "moe evaluate --workdir=/tmp/imported --dataset=/path/to/texts --rows=256 --json",
        ),
    )
