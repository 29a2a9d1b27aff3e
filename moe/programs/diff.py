"""moe diff --workdir=RUN_A --other=RUN_B: where two runs route, and predict, differently.

Both models read the same held-out text. Their experts are matched by the best permutation; the page says how many
tokens have the same expert in each layer, against chance and exchanged rows, and where the losses differ. Without
--other the checkpoints of one run are compared: when did its routing settle? docs/analysis.md shows the page.
"""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags

from moe.programs import cli

_WORKDIR = cli.WorkdirFlags()
_OTHER = cli.define_path("other", "Workdir of the second run or import; empty: the run's own earlier checkpoints.")
_OTHER_STEP = flags.DEFINE_integer("other_step", None, "Step of the second run; default: its newest.")
_BESIDE = flags.DEFINE_list("beside", [], "Further workdirs, such as another seed, whose agreement is shown too.")
_OUTPUT = cli.define_path("output", "Folder to write to; WORKDIR/diff if not given.")
_TOKENS = flags.DEFINE_integer("tokens", 16_384, "Held-out tokens per domain.", lower_bound=1)
_SHUFFLES = flags.DEFINE_integer("shuffles", 100, "Permutations of rows per null distribution.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the permutations and of untrained routers.", lower_bound=0)


@dataclasses.dataclass(frozen=True)
class _Reading:
    """A model's records of held-out text, without its variables: devices may lack room for two models.

    Attributes:
        workdir: the opened workdir.
        step: of the checkpoint.
        rows: domain → batches.
        recorder: compiled function that records the routing of tokens.
        records: what it recorded for the rows.
        losses: loss of every token; None if not asked for.
        untrained: what it recorded with random routers; None if not asked for, or for a model without a router.
    """

    workdir: Any
    step: int
    rows: Any
    recorder: Any
    records: Any
    losses: Any
    untrained: Any

    @property
    def name(self) -> str:
        """Name of the run, with the step."""
        return f"{Path(self.workdir.path).name} at {self.step}"


def _read(
    path: str,
    step: int | None,
    instead: dict[tuple[str, str], Any],
    *,
    losses: bool = False,
    seed: int | None = None,
) -> _Reading:
    """Read a model's records; with a seed, also those with routers drawn from it."""
    from moe.analysis.analyse import heldout_rows
    from moe.analysis.controls import has_router, untrain_routers
    from moe.analysis.difference import TokenLosses
    from moe.analysis.record import Recorder
    from moe.config import ConfigError
    from moe.training.open_workdir import open_workdir

    opened = open_workdir(path, instead)
    model = opened.program.config.model
    if model.encoder_layers:
        raise ConfigError(f"{path}: holds an encoder-decoder; only decoder-only models are compared")
    recorder = Recorder(opened.program)
    rows = heldout_rows(recorder, opened.prepared, int(_TOKENS.value or 0))
    step = opened.step_or_newest(step)
    variables = opened.variables(step)
    records = recorder(variables, rows)
    of_tokens = TokenLosses(opened.program)(variables, rows) if losses else None
    untrained = None
    if seed is not None and has_router(model):
        untrained = recorder(untrain_routers(variables, model, seed), rows)
    return _Reading(opened, step, rows, recorder, records, of_tokens, untrained)


def main() -> None:
    """Record, compare, write the page and print it."""
    from etils import epath

    from moe.analysis import difference, difference_page
    from moe.analysis.controls import hash_routing
    from moe.analysis.summary import piece_of
    from moe.training.open_workdir import same_text

    unread = _OTHER_STEP, _BESIDE, _SHUFFLES, _SEED
    cli.only_with(_OTHER.value is not None, "is read only with --other", *unread)
    one = _read(_WORKDIR.path, _WORKDIR.step, _WORKDIR.instead, losses=_OTHER.value is not None)
    if not _OTHER.value:
        print(_settling(one))
        return
    config = one.workdir.program.config
    text = same_text(config, one.workdir.prepared.domains)
    seed = int(_SEED.value or 0)
    other = _read(str(_OTHER.value), _OTHER_STEP.value, text, losses=True, seed=seed)
    compared = {"": other.records, "hash of the token": hash_routing(one.records)}
    if other.untrained is not None:
        compared[f"{Path(str(_OTHER.value)).name}, untrained routers"] = other.untrained
    compared |= {path: _read(path, None, text).records for path in _BESIDE.value}
    shuffles = int(_SHUFFLES.value or 0)
    found = {
        name: difference.agreements(one.records, records, shuffles=shuffles, seed=seed)
        for name, records in compared.items()
    }
    same = difference.same_layers(one.records, other.records, found[""])
    piece = piece_of(one.workdir.prepared.tokenizer)
    losses = difference.loss_differences(one.records, one.losses, other.losses, same, piece)
    page = difference_page.Difference((one.name, other.name), one.records.layers, found, losses, shuffles, seed)
    folder = epath.Path(_OUTPUT.value or epath.Path(_WORKDIR.path) / "diff")
    written = difference_page.write(page, folder)
    print(difference_page.markdown(page))
    print(f"Written to {folder}: {', '.join(written)}")


def _settling(one: _Reading) -> str:
    """The table of the run's earlier checkpoints beside this one."""
    from moe.analysis import difference_page
    from moe.config import ConfigError

    opened = one.workdir
    earlier = [step for step in opened.steps() if step < one.step]
    if not earlier:
        raise ConfigError("--other: must be given, since the run has no earlier checkpoint to compare with")
    shares = {
        step: (one.recorder(opened.variables(step), one.rows).first_choice == one.records.first_choice).mean(1).tolist()
        for step in earlier
    }
    return difference_page.settling(one.records.layers, shares, one.step)


def run() -> None:
    """The program."""
    cli.run(
        main,
        required=("workdir",),
        examples=(
            "moe diff --workdir=/tmp/quickstart --other=/tmp/switch --output=/tmp/diff",
            "moe diff --workdir=/tmp/quickstart",
        ),
    )
