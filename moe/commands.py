"""Start of a program, as a script, as the commands moe-train, moe-evaluate, ..., or as ``python -m moe COMMAND``.

Importing this module does not import JAX, so that the process can be set up first.
"""

from __future__ import annotations

import functools
import importlib
import sys

from moe import process

#: Command → module of :mod:`moe.programs`.
COMMANDS = {
    "train": "train",
    "evaluate": "evaluate",
    "generate": "generate",
    "import": "import_hf",
    "export": "export_hf",
    "analyze": "analyze_routing",
    "plan": "plan_pod",
    "ablate": "ablate",
    "conform": "conform",
    "diff": "diff",
    "surgery": "surgery",
    "playground": "playground",
    "advise": "advise",
}


def start(program: str) -> None:
    """Run a module of :mod:`moe.programs`."""
    prepare = process.use_tpu_compiler if program == COMMANDS["plan"] else process.prepare
    prepare()  # before JAX is imported; may restart this program
    importlib.import_module(f"moe.programs.{program}").run()


def main() -> None:
    """``python -m moe COMMAND [options]``."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: python -m moe COMMAND [options], with COMMAND one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(0 if sys.argv[1:2] in (["--help"], ["-h"]) else 1)
    command = sys.argv.pop(1)
    start(COMMANDS[command])


#: Entry points of the installed commands.
train, evaluate, generate, import_, export, analyze, plan, ablate, conform, diff, surgery, playground, advise = (
    functools.partial(start, program) for program in COMMANDS.values()
)
