"""Text of --help, in one form for all programs."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

from absl import flags

#: Exit codes of every program, and of those that can be stopped and continued.
_ENDS = """exit codes
  0    done
  1    an error, in one sentence on standard error"""
_STOPS = """
  75   stopped by SIGTERM or preempted: the same command continues
  130  stopped by Ctrl-C: the same command continues"""
EXIT_CODES = _ENDS + _STOPS
_MARGIN = 22  # columns of the names of options


def help_text(module: str, required: Sequence[str], examples: Sequence[str]) -> str:
    """Text of --help: what the program of a module does and needs, its options, examples, exit codes."""
    name = sys.argv[0] if module == "__main__" else module
    defined = sorted(flags.FLAGS.get_key_flags_for_module(name), key=lambda flag: flag.name)
    listed = {flag.name: flag for flag in defined}
    options = [flag for flag in defined if flag.name not in required] + [
        flags.FLAGS[name] for name in ("allow_module", "traceback")
    ]
    doc = sys.modules[module].__doc__ or ""
    return _layout(doc, [_described(listed[name]) for name in required], map(_described, options), examples, _STOPS)


def without_flags(doc: str, needed: Sequence[tuple[str, str]], examples: Sequence[str]) -> str:
    """Text of --help of a program that reads words, not flags.

    Args:
        doc: what it does.
        needed: words, and what they mean.
        examples: commands.
    """
    return _layout(doc, needed, (), examples, "")


def _layout(
    doc: str,
    needed: Iterable[tuple[str, str]],
    options: Iterable[tuple[str, str]],
    examples: Sequence[str],
    stops: str,
) -> str:
    """All sections, at the terminal's width."""
    width = min(max(shutil.get_terminal_size().columns, 60), 110)
    lists = {
        "needed": [_entry(name, meaning, width) for name, meaning in needed],
        "options": [_entry(name, meaning, width) for name, meaning in options],
        "examples": [_command(example, width) for example in examples],
    }
    sections = ["\n".join([heading, *lines]) for heading, lines in lists.items() if lines]
    return "\n\n".join([_wrapped(doc.strip(), width), *sections, f"{_ENDS}{stops}"])


def _described(flag: flags.Flag) -> tuple[str, str]:
    """A flag with its kind of value, and its meaning with its default."""
    kind = "" if flag.boolean else "=FILE" if flag.name == "config" else "=..."
    default = "" if flag.default in (None, False, "", []) else f" Default: {flag.default}."
    explanation = str(flag.help).partition(";\n")[0]  # absl adds a line on repeated options
    return f"--{flag.name}{kind}", f"{explanation}{default}"


def _entry(name: str, meaning: str, width: int) -> str:
    text = textwrap.indent(textwrap.fill(meaning, width - _MARGIN), " " * _MARGIN)
    return f"  {name}\n{text}" if len(name) > _MARGIN - 4 else f"  {name:<{_MARGIN - 2}}{text.strip()}"


def _command(example: str, width: int) -> str:
    """A command that can be copied: a comment stands above it, a line that is continued ends in a backslash."""
    command, _, comment = example.partition("  # ")
    quoted = re.sub(r"""(["']).*?\1""", lambda text: text[0].replace(" ", "\0"), command)  # is not broken
    lines = textwrap.wrap(quoted, width - 8, break_long_words=False, break_on_hyphens=False)
    return (f"  # {comment}\n" if comment else "") + "  " + " \\\n      ".join(lines).replace("\0", " ")


def _wrapped(text: str, width: int) -> str:
    """Paragraphs of a docstring in lines of this width; those with indented lines stay as they are."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(each if "\n " in f"\n{each}" else textwrap.fill(each, width) for each in paragraphs)
