"""Text of --help."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

from absl import flags

_EXIT_CODES = """exit codes
  0    done
  1    an error, in one sentence on standard error
  75   stopped by SIGTERM or preempted: the same command continues
  130  stopped by Ctrl-C: the same command continues
"""


def help_text(module: str, required: Sequence[str], examples: Sequence[str]) -> str:
    """Text of --help: what the program of a module does and needs, its options, examples, exit codes."""
    name = sys.argv[0] if module == "__main__" else module
    defined = sorted(flags.FLAGS.get_key_flags_for_module(name), key=lambda flag: flag.name)
    listed = {flag.name: flag for flag in defined}
    width = min(max(shutil.get_terminal_size().columns, 60), 110)

    def describe(flag: flags.Flag) -> str:
        kind = "" if flag.boolean else "=FILE" if flag.name == "config" else "=..."
        default = "" if flag.default in (None, False, "", []) else f" Default: {flag.default}."
        explanation = str(flag.help).partition(";\n")[0]  # absl adds a line on repeated options
        text = textwrap.fill(f"{explanation}{default}", width - 22)
        name = f"--{flag.name}{kind}"
        if len(name) > 18:
            return f"  {name}\n{textwrap.indent(text, ' ' * 22)}"
        return f"  {name:<20}{textwrap.indent(text, ' ' * 22).strip()}"

    options = [flag for flag in defined if flag.name not in required] + [
        flags.FLAGS[name] for name in ("allow_module", "traceback")
    ]
    sections = [
        _wrapped((sys.modules[module].__doc__ or "").strip(), width),
        "\n".join(["needed", *(describe(listed[name]) for name in required)]) if required else "",
        "\n".join(["options", *map(describe, options)]),
        "\n".join(["examples", *(f"  {example}" for example in examples)]) if examples else "",
        _EXIT_CODES,
    ]
    return "\n\n".join(filter(None, sections))


def _wrapped(text: str, width: int) -> str:
    """Paragraphs of a docstring in lines of this width; those with indented lines stay as they are."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(each if "\n " in f"\n{each}" else textwrap.fill(each, width) for each in paragraphs)
