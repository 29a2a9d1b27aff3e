"""python scripts/surgery.py --workdir=RUN --out=NEW --prune=0.25: change the experts of a trained model, untrained.

--prune=SHARE leaves out that share of each layer's experts, those of the lowest saliency (--by): assignments
(frequency), combine weights (weight), or what the loss rises by where an expert returns zero (ablation: an evaluation
of every expert). --split=N makes N finer experts of each, which compute the same; --merge=N joins each N. NEW is a
workdir to evaluate, fine-tune (start.checkpoint) or export; the table has the held-out loss before and after.
docs/surgery.md shows one.
"""

import dataclasses
import json

from absl import flags

from moe import cli

_WORKDIR = cli.WorkdirFlags()
_OUT = cli.define_path("out", "Workdir to create.")
_PRUNE = flags.DEFINE_float("prune", None, "Share of the experts to leave out.", lower_bound=0.0, upper_bound=1.0)
_BY = flags.DEFINE_enum("by", "weight", ["frequency", "weight", "ablation"], "Saliency of an expert.")
_SPLIT = flags.DEFINE_integer("split", None, "Finer experts to make of each.", lower_bound=2)
_MERGE = flags.DEFINE_integer("merge", None, "Consecutive experts to join into one.", lower_bound=2)
_TOKENS = flags.DEFINE_integer("tokens", 16_384, "Held-out tokens per domain of the table.", lower_bound=1)
_CALIBRATION = flags.DEFINE_integer("calibration", 4_096, "Tokens per domain that saliencies are of.", lower_bound=1)


def main() -> None:
    """Operate, write the workdir, and print the table."""
    import jax
    import numpy as np
    from etils import epath

    from moe.analysis import difference, surgery
    from moe.analysis.analyse import heldout_rows
    from moe.analysis.record import Recorder
    from moe.atomic_files import write_atomic
    from moe.checkpoints import parameters as stored
    from moe.checkpoints.workdir import CONFIG, read_config
    from moe.config import ConfigError, LoraConfig, to_dict
    from moe.data.tokenizer_files import find_tokenizer
    from moe.escaping import markdown_table
    from moe.models.flops import count_parameters
    from moe.models.state import join
    from moe.training.averaging import streamed
    from moe.training.open_run import open_workdir
    from moe.training.step import build

    chosen = [flag for flag in (_PRUNE, _SPLIT, _MERGE) if flag.value is not None]
    if len(chosen) != 1:
        raise ConfigError("give one of --prune, --split and --merge")
    target = epath.Path(str(_OUT.value))
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"--out={target}: holds files; use a new folder")
    opened = open_workdir(_WORKDIR.path, _WORKDIR.instead)
    config, mesh = opened.program.config, opened.program.mesh
    model = config.model
    surgery.check(model)
    step = max(opened.steps()) if _WORKDIR.step is None else _WORKDIR.step
    before = stored.read_parameters(opened.path, model, step=step, dtype=np.float32)
    biases = stored.read_biases(opened.path, model, step=step)
    recorder = Recorder(opened.program)

    losses = difference.TokenLosses(opened.program)

    if _PRUNE.value is not None:
        size = model.moe.num_experts
        keep = size - round(_PRUNE.value * size)
        rows = heldout_rows(recorder, opened.prepared, int(_CALIBRATION.value or 0))
        if _BY.value == "ablation":
            saliency = surgery.ablation(model, before, lambda tree: float(np.nanmean(losses(join(tree, biases), rows))))
        else:
            measure = {"frequency": surgery.frequency, "weight": surgery.weight}[str(_BY.value)]
            saliency = measure(recorder(join(before, biases), rows))[:, :size]
        kept = surgery.most_salient(saliency, keep)
        changed, after, state = surgery.prune(model, before, biases, kept)
        for layer, experts in enumerate(kept):
            print(f"MoE layer {layer}: without {sorted(set(range(size)) - set(experts.tolist()))}")
    elif _SPLIT.value is not None:
        changed, after, state = surgery.split(model, before, biases, int(_SPLIT.value))
    else:
        changed, after, state = surgery.merge(model, before, biases, int(_MERGE.value or 1))
    with jax.set_mesh(mesh):
        program = build(dataclasses.replace(config, model=changed), mesh)
    rows = heldout_rows(recorder, opened.prepared, int(_TOKENS.value or 0))
    first = losses(join(before, biases), rows)
    second = difference.TokenLosses(program)(join(after, state), rows)
    flat = recorder(join(before, biases), rows)
    table = []
    for number, name in enumerate(("all", *flat.domains)):
        inside = np.ones(len(first), bool) if number == 0 else flat.domain == number - 1
        found = difference.loss_difference(np.where(inside, second - first, np.nan), flat.row)
        if found is not None:
            means = f"{np.nanmean(first[inside]):.4f}", f"{np.nanmean(second[inside]):.4f}"
            change = f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
            table.append((name, *means, change, f"{found.tokens:,}"))
    print(markdown_table(("domain", "before, nats per token", "after", "change [95 %]", "tokens"), table))
    sizes = [count_parameters(each) for each in (model, changed)]
    print(f"parameters {sizes[0][0]:,} → {sizes[1][0]:,}, active {sizes[0][1]:,} → {sizes[1][1]:,}")
    target.mkdir(parents=True, exist_ok=True)
    stored.write_parameters(target, streamed(after), streamed(state))
    for name, content in find_tokenizer(opened.path).files.items():
        write_atomic(target / name, content)
    written = dataclasses.replace(read_config(opened.path), model=changed, lora=LoraConfig())
    write_atomic(target / CONFIG, json.dumps(to_dict(written), indent=2))
    print(f"Written to {target}")


def run() -> None:
    """The program."""
    cli.run(
        main,
        required=("workdir", "out"),
        examples=(
            "python scripts/surgery.py --workdir=/tmp/quickstart --out=/tmp/pruned --prune=0.25 --by=ablation",
            "python scripts/surgery.py --workdir=/tmp/quickstart --out=/tmp/finer --split=2",
        ),
    )
