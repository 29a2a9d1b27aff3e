"""Start of a program, as ``moe COMMAND``, as ``moe-train``, ``moe-evaluate``, ..., or as a script.

Importing this module does not import JAX, so that the process can be set up first.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Iterable
from pathlib import Path

import moe
from moe.system import process

#: Command → module of :mod:`moe.programs` and what it does.
COMMANDS = {
    "train": ("train", "train, resume, fine-tune, upcycle or distil a model"),
    "evaluate": ("evaluate", "held-out loss of a run or an import"),
    "generate": ("generate", "text, answers or rollouts of a model"),
    "import": ("import_hf", "read an open checkpoint"),
    "export": ("export_hf", "write a checkpoint for transformers, vLLM and others"),
    "analyze": ("analyze_routing", "what experts specialise in, against chance"),
    "plan": ("plan_pod", "memory, exchanges, time and cost on hardware that is absent"),
    "ablate": ("ablate", "train a suite of configs over seeds, with a report"),
    "conform": ("conform", "check any MoE layer against its equations"),
    "diff": ("diff", "how similarly two runs route, and where one predicts better"),
    "surgery": ("surgery", "prune, split, merge or regroup the experts of a model"),
    "playground": ("playground", "a page that runs a small model in the browser"),
    "advise": ("advise", "what to train for a budget"),
    "diverge": ("diverge", "whether rounding explains that two runs choose other experts"),
    "average": ("average", "average the checkpoints of a run"),
    "downstream": ("downstream", "tasks of lm-evaluation-harness"),
    "translate": ("translate", "BLEU of a run on pairs"),
    "overlap": ("heldout_overlap", "share of held-out text that training text repeats"),
    "configs": ("configs", "the configs and suites that are installed"),
    "completion": ("completion", "tab completion for bash, zsh and fish"),
}


def start(program: str) -> None:
    """Run a module of :mod:`moe.programs`."""
    if sys.platform == "win32":
        sys.exit("error: moe runs on Linux and macOS; on Windows, in WSL 2")
    if "MoELayer" not in getattr(moe, "__all__", ()):  # another distribution wrote over moe/__init__.py, or removed it
        others = other_owners(importlib.metadata.distributions()) or ["another distribution"]
        sys.exit(f"error: {collision(others)}")
    if program not in ("configs", "completion"):
        prepare = process.use_tpu_compiler if program == "plan_pod" else process.prepare
        prepare()  # before JAX is imported; may restart this program
    importlib.import_module(f"moe.programs.{program}").run()


def main() -> None:
    """``moe COMMAND [options]``."""
    given = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if given in COMMANDS:
        del sys.argv[1]
        start(COMMANDS[given][0])
    elif given == "--version":
        print(f"moe-jax {importlib.metadata.version('moe-jax')}")
        if others := other_owners(importlib.metadata.distributions()):
            sys.exit(f"error: {collision(others)}")
    elif given in ("--help", "-h", "help"):
        with process.closed_output_exits():
            print(usage(), flush=True)
    else:
        near = difflib.get_close_matches(given, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}"
        sys.exit(f"error: moe {given}: no such command; {hint}")


def usage() -> str:
    """Text of ``moe --help``."""
    from moe.programs.help_text import EXIT_CODES

    lines = [f"  {name:<12}{explanation}" for name, (_, explanation) in COMMANDS.items()]
    examples = (
        "moe train --config=quickstart --workdir=/tmp/quickstart",
        "moe plan --config=mixtral_8x7b --topology=v5p-128",
    )
    return "\n".join(
        (
            "usage: moe COMMAND [options]",
            "\ncommands",
            *lines,
            "\nexamples",
            *(f"  {example}" for example in examples),
            f"\n{EXIT_CODES}",
            "\nmoe COMMAND --help shows a command's options, moe --version the version",
        )
    )


def other_owners(distributions: Iterable[importlib.metadata.Distribution]) -> list[str]:
    """Names of other installed distributions that have files in this package's folder, ``moe/``."""
    found = set()
    for distribution in distributions:
        name = distribution.metadata["Name"] or ""
        record = distribution.read_text("RECORD") or ""
        if name != "moe-jax" and any(line.startswith("moe/") for line in record.splitlines()):
            found.add(name)
    return sorted(found)


def collision(others: list[str]) -> str:
    """Sentence about distributions that install files over this package's."""
    names, them = ", ".join(others), "it" if len(others) == 1 else "them"
    return (
        f"{names} also installs a top-level package moe, in {Path(__file__).parent}; keep {them} in another "
        "environment, and reinstall moe-jax here with pip install --force-reinstall --no-deps moe-jax"
    )


#: Entry points of the installed commands ``moe-train``, ``moe-evaluate``, ...
(
    train,
    evaluate,
    generate,
    import_,
    export,
    analyze,
    plan,
    ablate,
    conform,
    diff,
    surgery,
    playground,
    advise,
    diverge,
    *_,
) = (functools.partial(start, program) for program, _ in COMMANDS.values())
