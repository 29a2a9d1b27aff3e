"""moe analyze --workdir=WORKDIR: analyses the routing of a run's or an import's checkpoint.

Prints tables, and writes analysis.json, analysis.md, PNGs and experts.html (text coloured by expert) to --output. A run
with several checkpoints also gets router saturation. The same seed gives the same files. docs/analysis.md explains the
measures.
"""

import functools
from pathlib import Path

from absl import flags

from moe.programs import cli

_WORKDIR = cli.WorkdirFlags()
_OUTPUT = cli.define_path("output", "Folder to write to; WORKDIR/analysis if not given.")
_TOKENS = flags.DEFINE_integer("tokens", 16_384, "Held-out tokens per domain.")
_SHUFFLES = flags.DEFINE_integer("shuffles", 100, "Permutations per null distribution.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the permutations.")
_CHARACTERS = flags.DEFINE_integer("characters", 6_000, "Characters of each domain in experts.html.")
_DOCUMENT = flags.DEFINE_integer(
    "document", None, "Number of the held-out document of each domain in experts.html; default: a legible one."
)
_CODE = flags.DEFINE_string("code_domain", "python", "Domain whose documents are Python source.")


def main() -> None:
    """Run the analysis, write its files and print its tables."""
    from etils import epath

    from moe.analysis import analyse, stacks
    from moe.analysis.markdown import markdown
    from moe.analysis.record import Recorder
    from moe.training.open_workdir import open_workdir

    opened = open_workdir(_WORKDIR.path, _WORKDIR.instead)
    last = opened.step_or_newest(_WORKDIR.step)
    variables = opened.variables(last)
    folder = epath.Path(_OUTPUT.value or epath.Path(opened.path) / "analysis")
    names = stacks.STACKS if opened.program.config.model.encoder_layers else ("",)
    recorders = {stack: Recorder(opened.program, stack) for stack in names}
    for stack, recorder in recorders.items():
        found = analyse.analyse(
            recorder,
            variables,
            opened.prepared,
            tokens=_TOKENS.value,
            shuffles=_SHUFFLES.value,
            seed=_SEED.value,
            code_domain=_CODE.value,
            step=last,
            characters=_CHARACTERS.value,
            document=_DOCUMENT.value,
            earlier={step: functools.partial(opened.variables, step) for step in opened.steps() if step < last},
        )
        title = f"Routing of {Path(opened.path).name}{f', {stack},' if stack else ''} at step {last}"
        written = analyse.write(found, folder / stack, title)
        print(markdown(found.summary, title))
        print(f"Written to {folder / stack}: {', '.join(written)}")
    if "encoder" in recorders:
        numbers = {"tokens": _TOKENS.value, "shuffles": _SHUFFLES.value, "seed": _SEED.value}
        compared = stacks.compare(recorders, variables, opened.prepared, **numbers)
        print(stacks.write(compared, folder))


def run() -> None:
    """The program."""
    cli.run(
        main,
        required=("workdir",),
        examples=(
            "moe analyze --workdir=/tmp/quickstart",
            "moe analyze --workdir=/tmp/imported --dataset=/path/to/texts --output=/tmp/page",
        ),
    )
