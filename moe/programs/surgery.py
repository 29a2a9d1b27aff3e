"""moe surgery --workdir=RUN --out=NEW --prune=0.25: edit a model's experts without training.

--prune=SHARE leaves out that share of each layer's experts, those of the lowest saliency (--by): assignments
(frequency), combine weights (weight), combine weight times norm of the output (reap), assignments times the output's
standard deviation (variance), or what the loss rises by where an expert returns zero (ablation: an evaluation of every
expert). Their tokens choose again, unless --others=zero keeps them as experts that return 0, or --others=novice as
experts that return one vector, the mean of their outputs; --others=merge averages each into the expert that is most
like it. --by=pool keeps the pool that the gate emo has for the text of --domains, as a plain top-K model. --split=N
makes N finer experts of each, which compute the same; --merge=N joins each N; --regroup=N sorts them so that a
token's experts lie in few of N groups, such as the devices of an expert axis. NEW is a workdir to evaluate, fine-tune
(start.checkpoint) or export; the table has the held-out loss before and after, and with --topology the memory and the
step that the planner predicts for both. docs/surgery.md shows one.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from moe.programs import cli

_WORKDIR = cli.WorkdirFlags()
_OUT = cli.define_path("out", "Workdir to create.")
_PRUNE = flags.DEFINE_float("prune", None, "Share of the experts to leave out.", lower_bound=0.0, upper_bound=1.0)
_BY = flags.DEFINE_enum(
    "by", "weight", ["frequency", "weight", "reap", "variance", "ablation", "pool"], "Measure of an expert's saliency."
)
_OTHERS = flags.DEFINE_enum(
    "others", "drop", ["drop", "zero", "novice", "merge"], "What replaces the experts left out."
)
_SPLIT = flags.DEFINE_integer("split", None, "Finer experts to make of each.", lower_bound=2)
_MERGE = flags.DEFINE_integer("merge", None, "Consecutive experts to join into one.", lower_bound=2)
_REGROUP = flags.DEFINE_integer("regroup", None, "Groups into which to sort experts, by co-activation.", lower_bound=2)
_TOKENS = flags.DEFINE_integer("tokens", 16_384, "Held-out tokens per domain of the table.", lower_bound=1)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Chips for which the planner compares the models, such as v5e:2x2.")
_CALIBRATION = flags.DEFINE_integer("calibration", 4_096, "Tokens per domain for measuring saliencies.", lower_bound=1)


def main() -> None:
    """Operate, print the table, and write the workdir."""
    import jax
    import numpy as np

    from moe.analysis import difference, surgery
    from moe.analysis.analyse import heldout_rows
    from moe.analysis.record import Recorder
    from moe.checkpoints import parameters as stored
    from moe.checkpoints import streamed
    from moe.checkpoints.workdir import read_config
    from moe.config import ConfigError, LoraConfig
    from moe.data.tokenizer_files import companions
    from moe.models.flops import count_parameters
    from moe.models.state import join
    from moe.system.atomic_files import refuse_files
    from moe.system.escaping import markdown_table
    from moe.training.open_workdir import on_devices, open_workdir
    from moe.training.step import build

    if sum(flag.value is not None for flag in (_PRUNE, _SPLIT, _MERGE, _REGROUP)) != 1:
        raise ConfigError("give one of --prune, --split, --merge and --regroup")
    cli.only_with(_PRUNE.value is not None, "is read only with --prune", _BY, _OTHERS)
    calibrated = _PRUNE.value is not None or _REGROUP.value is not None
    cli.only_with(calibrated, "is read only with --prune and --regroup", _CALIBRATION)
    if _BY.value == "pool" and _OTHERS.value != "drop":
        raise ConfigError(f"--others={_OTHERS.value}: must be drop with --by=pool, which keeps one pool of experts")
    out = str(_OUT.value)
    refuse_files(out)
    opened = open_workdir(_WORKDIR.path, _WORKDIR.instead)
    config, model = opened.program.config, opened.program.config.model
    surgery.check(model)
    if _PRUNE.value is not None:
        surgery.experts_left(model, float(_PRUNE.value))
    if _REGROUP.value is not None:
        surgery.check_groups(model, int(_REGROUP.value))
    step = opened.step_or_newest(_WORKDIR.step)
    plans = [_plan(opened.path)] if _TOPOLOGY.value else []  # first, so that chips without a compiler fail at once
    before = stored.read_parameters(opened.path, model, step=step, dtype=np.float32)
    biases = stored.read_biases(opened.path, model, step=step)
    recorder, losses = Recorder(opened.program), difference.TokenLosses(opened.program)
    changed, after, new_biases = _edited(opened, (model, before, biases), recorder, losses)
    with jax.set_mesh(opened.program.mesh):
        program = build(dataclasses.replace(config, model=changed), opened.program.mesh)
    rows = heldout_rows(recorder, opened.prepared, int(_TOKENS.value or 0))
    programs = (opened.program, recorder, losses), (program, Recorder(program), difference.TokenLosses(program))
    measured = []
    for (edited, record, measure), variables in zip(
        programs, (join(before, biases), join(after, new_biases)), strict=True
    ):
        placed = on_devices(edited, variables)
        measured.append((measure(placed, rows), record(placed, rows)))
        del placed  # a device may lack room for both models
    (old_losses, old_records), (new_losses, new_records) = measured
    print(_table(old_losses, new_losses, rows))
    print(f"\n{_routing((old_records, new_records), (model.moe.num_experts, changed.moe.num_experts))}\n")
    (total, active), (new_total, new_active) = count_parameters(model), count_parameters(changed)
    print(f"parameters {total:,} → {new_total:,}, active {active:,} → {new_active:,}")
    written = dataclasses.replace(read_config(opened.path), model=changed, lora=LoraConfig())
    streamed.write_workdir(out, written, after, new_biases, companions(opened.path))
    print(f"Written to {out}")
    if _TOPOLOGY.value:
        header = str(_TOPOLOGY.value), "memory per chip, MiB", "train step, ms"
        named = zip(("before", "after"), (*plans, _plan(out)), strict=True)
        print(f"\n{markdown_table(header, [(name, *plan) for name, plan in named])}")


def _edited(opened: Any, whole: Any, recorder: Any, losses: Any) -> Any:
    """The model after the operation of the flags: config, parameters, selection biases."""
    from moe.analysis import surgery
    from moe.analysis.analyse import heldout_rows
    from moe.models.state import join
    from moe.training.open_workdir import on_devices

    model, before, biases = whole
    if _SPLIT.value is not None:
        return surgery.split(model, before, biases, int(_SPLIT.value))
    if _MERGE.value is not None:
        return surgery.merge(model, before, biases, int(_MERGE.value))
    rows = heldout_rows(recorder, opened.prepared, int(_CALIBRATION.value or 0))
    if _PRUNE.value is not None:
        return _pruned(opened.program, whole, recorder, losses, rows)
    return _regrouped(whole, recorder(on_devices(opened.program, join(before, biases)), rows))


def _pruned(program: Any, whole: Any, recorder: Any, losses: Any, rows: Any) -> Any:
    """The model without its least salient experts: config, parameters, selection biases."""
    import numpy as np

    from moe.analysis import merging, saliency, surgery
    from moe.models.state import join
    from moe.training.open_workdir import on_devices

    model, before, biases = whole
    size = model.moe.num_experts
    merges, by = _OTHERS.value == "merge", str(_BY.value)
    variables = on_devices(program, join(before, biases))
    records: Any = recorder(variables, rows) if merges or by in ("frequency", "weight", "variance") else None
    needed = by == "variance" or _OTHERS.value == "novice"
    moments: Any = saliency.OutputMoments(program)(variables, rows) if needed else None
    if by == "ablation":
        del variables  # a device may lack room for two models
        found = saliency.ablation(
            model, before, lambda tree: float(np.nanmean(losses(on_devices(program, join(tree, biases)), rows)))
        )
    elif by == "pool":
        found = saliency.PoolSums(program)(variables, rows)
    elif by == "reap":
        found = saliency.Reap(program)(variables, rows)
    else:
        found = (saliency.weight if by == "weight" else saliency.frequency)(records)[:, :size]
        found = found * saliency.deviation(moments) if by == "variance" else found
    left, groups = surgery.experts_left(model, float(_PRUNE.value or 0)), getattr(model.moe.gate, "groups", 1)
    kept = saliency.most_salient(found, left, groups)
    for layer, experts in enumerate(kept):
        print(f"MoE layer {layer}: without {sorted(set(range(size)) - set(experts.tolist()))}")
    if merges:
        usage = saliency.frequency(records)[:, :size]
        return merging.absorb(model, before, biases, kept, usage)
    novices = saliency.mean_output(moments) if _OTHERS.value == "novice" else None
    pruned = surgery.prune(model, before, biases, kept, null=_OTHERS.value == "zero", novices=novices)
    return (surgery.as_one_pool(pruned[0]), *pruned[1:]) if by == "pool" else pruned


def _regrouped(whole: Any, records: Any) -> Any:
    """The same function with its experts in another order: config, parameters, selection biases."""
    import numpy as np

    from moe.analysis import measures, surgery

    model, before, biases = whole
    groups, size = int(_REGROUP.value or 1), model.moe.num_experts
    chosen = records.expert_index, records.chosen, records.num_experts  # those without an FFN are last
    counts = measures.coactivation(*chosen)[:, :size, :size]
    orders = []
    for layer, (together, member) in enumerate(zip(counts, measures.membership(*chosen), strict=True)):
        tried = np.arange(size), surgery.order_together(together, groups)  # which is greedy, and may be no better
        spread = [surgery.groups_of_tokens(member, each, groups) for each in tried]
        best = int(np.argmin(spread))
        print(f"MoE layer {layer}: a token has experts in {spread[0]:.2f} → {spread[best]:.2f} of {groups} groups")
        orders.append(tried[best])
    return surgery.prune(model, before, biases, np.stack(orders))


def _plan(folder: str) -> tuple[str, str]:
    """The planner's memory and step of a workdir, compiled for the chips in a process of its own."""
    from moe.config import ConfigError

    command = ["plan", f"--config={folder}/config.json", f"--topology={_TOPOLOGY.value}", "--json"]
    command.append(f"--allow_module={','.join(flags.FLAGS.allow_module)}")
    # With -P the current directory, perhaps a downloaded folder, is not searched for packages.
    places = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "moe", *command],
        env=os.environ | {"PYTHONPATH": places},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the planner exited with {done.returncode}"]
        raise ConfigError(lines[-1].removeprefix("error: "))
    made = json.loads(done.stdout)
    low, high = (1e3 * seconds for seconds in made["step_interval"])
    step = f"{1e3 * made['step_seconds']:.3g} ({low:.3g} to {high:.3g})"
    return f"{made['memory_total'] / 2**20:,.1f}", step


def _table(first: Any, second: Any, rows: Any) -> str:
    """Losses before and after, by domain."""
    import numpy as np

    from moe.analysis import difference
    from moe.system.escaping import markdown_table

    domain, row = difference.places(rows)
    table = []
    for number, name in enumerate(("all", *rows)):
        inside = np.ones(len(first), bool) if number == 0 else domain == number - 1
        found = difference.loss_difference(np.where(inside, second - first, np.nan), row)
        if found is not None:
            means = f"{np.nanmean(first[inside]):.4f}", f"{np.nanmean(second[inside]):.4f}"
            change = f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
            table.append((name, *means, change, f"{found.tokens:,}"))
    return markdown_table(("domain", "before, nats per token", "after", "change [95 %]", "tokens"), table)


def _routing(records: tuple[Any, Any], ffns: tuple[int, int]) -> str:
    """Spread of each layer's assignments over experts, before and after; experts without an FFN are zero experts,
    novices and the like."""
    import numpy as np

    from moe.analysis import saliency
    from moe.system.escaping import markdown_table

    table = []
    shares = [saliency.frequency(record) for record in records]  # [L,E and experts without an FFN]
    for layer, pair in enumerate(zip(*shares, strict=True)):
        cells = []
        for share, count in zip(pair, ffns, strict=True):
            own = share[:count]
            largest = own.max() / max(own.mean(), 1e-12)
            cells.append((f"{largest:.2f}", f"{np.sum(own == 0)}", f"{100 * share[count:].sum():.1f}"))
        table.append((str(layer), *(f"{before} → {after}" for before, after in zip(*cells, strict=True))))
    header = ("MoE layer", "largest load / mean", "experts unused", "assignments without an FFN, %")
    return markdown_table(header, table)


def run() -> None:
    """The program."""
    cli.run(
        main,
        required=("workdir", "out"),
        examples=(
            "moe surgery --workdir=/tmp/quickstart --out=/tmp/pruned --prune=0.25 --by=ablation",
            "moe surgery --workdir=/tmp/quickstart --out=/tmp/finer --split=2",
            "moe surgery --workdir=/tmp/emo --out=/tmp/python --prune=0.75 --by=pool --domains=python",
        ),
    )
