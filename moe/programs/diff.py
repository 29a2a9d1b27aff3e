"""python scripts/diff.py --workdir=RUN_A --other=RUN_B: where two runs route, and predict, differently.

Both models read the same held-out text. Their experts are matched by the best permutation; the page says how many
tokens have the same expert in each layer, against chance and exchanged rows, and where the losses differ. Without
--other the checkpoints of one run are compared: when did its routing settle? docs/diff.md shows the page.
"""

from pathlib import Path
from typing import Any

from absl import flags

from moe import cli

_WORKDIR = cli.WorkdirFlags()
_OTHER = cli.define_path("other", "Workdir of the second run or import; empty: the run's own earlier checkpoints.")
_OTHER_STEP = flags.DEFINE_integer("other_step", None, "Step of the second run; default: its newest.")
_BESIDE = flags.DEFINE_list("beside", [], "Further workdirs, such as another seed, whose agreement is shown beside.")
_OUTPUT = cli.define_path("output", "Folder to write to; WORKDIR/diff if not given.")
_TOKENS = flags.DEFINE_integer("tokens", 16_384, "Held-out tokens per domain.", lower_bound=1)
_SHUFFLES = flags.DEFINE_integer("shuffles", 100, "Exchanges of rows per null distribution.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the exchanges and of untrained routers.", lower_bound=0)


def main() -> None:
    """Record, compare, write the page and print it."""
    from etils import epath

    from moe.analysis import difference, difference_page
    from moe.analysis.analyse import heldout_rows
    from moe.analysis.controls import has_router, hash_routing, untrain_routers
    from moe.analysis.record import Recorder
    from moe.analysis.summary import piece_of
    from moe.config import ConfigError
    from moe.training.open_run import open_workdir

    opened = open_workdir(_WORKDIR.path, _WORKDIR.instead)
    config = opened.program.config
    if config.model.encoder_layers:
        raise ConfigError("--workdir: holds an encoder-decoder; only decoder-only models are compared")
    recorder = Recorder(opened.program)
    rows = heldout_rows(recorder, opened.prepared, _TOKENS.value)
    last = max(opened.steps()) if _WORKDIR.step is None else _WORKDIR.step
    variables = opened.variables(last)
    one = recorder(variables, rows)
    if not _OTHER.value:
        earlier = [step for step in opened.steps() if step < last]
        if not earlier:
            raise ConfigError("--other: must be given, since the run has no earlier checkpoint to compare with")
        shares: dict[int, list[float]] = {}
        for step in earlier:
            then = recorder(opened.variables(step), rows).first_choice
            shares[step] = (then == one.first_choice).mean(axis=1).tolist()
        print(difference_page.settling(one.layers, shares, last))
        return
    same_text: dict[tuple[str, str], Any] = {
        ("data", "dataset"): config.data.dataset,
        ("data", "domains"): opened.prepared.domains,
        ("data", "directory"): config.data.directory,
        ("data", "objective"): config.data.objective,
        ("data", "sequence_length"): config.data.sequence_length,
        ("train", "batch_size"): config.train.batch_size,
    }

    def opened_beside(path: str, step: int | None) -> tuple[Any, Any, Any]:
        workdir = open_workdir(path, same_text)
        own = Recorder(workdir.program)
        values = workdir.variables(step)
        read = heldout_rows(own, workdir.prepared, _TOKENS.value)
        records = own(values, read)
        difference.check_same_tokens(one, records)
        return workdir, values, (own, read, records)

    against, theirs, (own, read, other) = opened_beside(str(_OTHER.value), _OTHER_STEP.value)
    controls = {"hash of the token": hash_routing(one)}
    if has_router(against.program.config.model):
        untrained = untrain_routers(theirs, against.program.config.model, _SEED.value)
        controls[f"{Path(str(_OTHER.value)).name}, untrained routers"] = own(untrained, read)
    for path in _BESIDE.value:
        controls[Path(path).name] = opened_beside(path, None)[2][2]
    shuffles, seed = int(_SHUFFLES.value or 0), int(_SEED.value or 0)
    others = {"": other, **controls}
    found = {name: difference.agreements(one, of, shuffles=shuffles, seed=seed) for name, of in others.items()}
    same = difference.same_layers(one, other, found[""])
    losses = difference.loss_differences(
        one,
        difference.TokenLosses(opened.program)(variables, rows),
        difference.TokenLosses(against.program)(theirs, read),
        same,
        piece_of(opened.prepared.tokenizer),
    )
    step = _OTHER_STEP.value if _OTHER_STEP.value is not None else max(against.steps())
    names = f"{Path(opened.path).name} at {last}", f"{Path(against.path).name} at {step}"
    page = difference_page.Difference(names, one.layers, found, losses, shuffles, seed)
    folder = epath.Path(_OUTPUT.value or epath.Path(opened.path) / "diff")
    written = difference_page.write(page, folder)
    print(difference_page.markdown(page))
    print(f"Written to {folder}: {', '.join(written)}")


def run() -> None:
    """The program."""
    cli.run(
        main,
        required=("workdir",),
        examples=(
            "python scripts/diff.py --workdir=/tmp/quickstart --other=/tmp/switch --output=/tmp/diff",
            "python scripts/diff.py --workdir=/tmp/quickstart",
        ),
    )
