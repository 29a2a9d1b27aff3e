"""A page that runs a small MoE in the browser: moe playground --workdir=RUN --output=page.html.

The page needs no network and no server: its weights (int8) and its JavaScript are inside. --weights also writes what
it is made of, about a third smaller; --packed makes the page from such a file instead of a run. Models that the
JavaScript does not support are refused. docs/playground.md shows the page.
"""

import os
from pathlib import Path

from absl import flags

from moe.programs import cli
from moe.system import shipped

_WORKDIR = cli.WorkdirFlags()
_OUTPUT = cli.define_path("output", "HTML file to write.")
_WEIGHTS = cli.define_path("weights", "npz file to write as well, from which --packed makes the page again.")
_PACKED = cli.define_path("packed", "File written by --weights, instead of a workdir.")
_TITLE = flags.DEFINE_string("title", "A Mixture-of-Experts to play with", "Title of the page.")
_TOKENS = flags.DEFINE_integer("tokens", 16_384, "Held-out tokens per domain for the page's losses.", lower_bound=1)


def main() -> None:
    """Make the page."""
    from moe.config import ConfigError
    from moe.playground import packed as weights
    from moe.playground.making import make
    from moe.playground.page import render
    from moe.system.atomic_files import write_atomic
    from moe.training.open_workdir import open_workdir

    if _WORKDIR.is_given and _PACKED.value is not None:
        raise ConfigError("give one of --workdir and --packed")
    unread = _TITLE, _TOKENS, *_WORKDIR.others
    cli.only_with(_WORKDIR.is_given, "is read only with --workdir; a packed model has its own", *unread)
    _refuse_one_file_twice()
    if not _WORKDIR.is_given:
        packed = weights.read(Path(_PACKED.value or shipped.PLAYGROUND))
    else:
        opened = open_workdir(_WORKDIR.path, _WORKDIR.instead)
        step = opened.step_or_newest(_WORKDIR.step)
        packed = make(opened, step, title=str(_TITLE.value), tokens=int(_TOKENS.value or 0))
    page = render(packed)
    if _WEIGHTS.value:
        weights.write(Path(_WEIGHTS.value), packed)
    write_atomic(Path(str(_OUTPUT.value)), page)
    print(packed.header["about"])
    print(f"{_OUTPUT.value}: {len(page.encode()) / 1e6:.1f} MB")


def _refuse_one_file_twice() -> None:
    """Raise ConfigError where the page would replace its own weights, whatever the path's spelling."""
    from moe.config import ConfigError

    given: dict[str, str] = {}
    for name, flag in (("packed", _PACKED), ("weights", _WEIGHTS), ("output", _OUTPUT)):
        if flag.value is None:
            continue
        place = os.path.realpath(flag.value)
        if place in given:
            raise ConfigError(f"--{name}={flag.value}: must be another file than --{given[place]}")
        given[place] = name


def run() -> None:
    """The program."""
    cli.run(
        main,
        required=("output",),
        examples=(
            "moe playground --output=playground.html",
            "moe playground --workdir=/tmp/playground --output=playground.html",
        ),
    )
