"""Command lines: flags over a config file, and errors as one sentence on stderr with exit code 1.

Importing this module does not import JAX: help, and errors in the names of flags, come at once. What parses values
imports the config's schema, and with it JAX, so entry points call :mod:`moe.system.process` before.
"""

from __future__ import annotations

import difflib
import errno
import itertools
import logging as standard_logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging

import moe
from moe.programs.help_text import help_text
from moe.system import process, shipped
from moe.system.escaping import terminal
from moe.system.fields import ConfigError

if TYPE_CHECKING:
    from moe.config import Config
    from moe.config.files import Settings

_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show the traceback of an error.")
# Read by _parse from the command line, since a run's config.json is checked while the other flags are parsed.
flags.DEFINE_list("allow_module", [], "Modules with gates and other objects that a workdir's config may name.")
flags.disclaim_key_flags()  # what the functions below define belongs to the program that calls them


def define_config(default: os.PathLike[str] | None = None) -> flags.FlagHolder:
    """Define the flag --config=FILE, whose fields --config.x.y=value overrides."""
    explanation = (
        "Name of a config (`moe configs` lists them), a file with get_config(), or a run's config.json. "
        "--config.SECTION.FIELD=VALUE overrides any setting, as --config.model.moe.num_experts=16 does."
    )
    path = None if default is None else os.fspath(default)
    return flags.DEFINE(flags.ArgumentParser(), "config", path, explanation, serializer=flags.ArgumentSerializer())


class _Path(flags.ArgumentParser):
    """Path; a leading ~ is expanded even where the shell does not."""

    syntactic_help = "a path"

    def parse(self, argument: str) -> str:
        from moe.config import check_path

        check_path("path", argument)
        return os.path.expanduser(argument)


def define_path(name: str, explanation: str) -> flags.FlagHolder:
    """Define a flag --name=PATH, for a local or remote path."""
    return flags.DEFINE(_Path(), name, None, explanation, serializer=flags.ArgumentSerializer())


def only_with(holds: bool, reason: str, *unused: flags.FlagHolder) -> None:
    """Refuse flags that were given but have no effect, unless the condition holds.

    Args:
        holds: whether the flags have an effect.
        reason: end of the message, such as "is read only with --prune".
        unused: the flags.

    Raises:
        ConfigError: the first one that was given.
    """
    for flag in unused if not holds else ():
        if flag.present:
            raise ConfigError(f"--{flag.name}: {reason}")


class WorkdirFlags:
    """Flags of scripts that open a workdir: its path, the checkpoint's step, and settings to override."""

    def __init__(self) -> None:
        self._workdir = define_path("workdir", "Folder of a run or an import.")
        self._step = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
        self._instead: dict[tuple[str, str], flags.FlagHolder] = {
            ("data", "dataset"): flags.DEFINE_string("dataset", None, "data.dataset instead of the workdir's."),
            ("data", "domains"): flags.DEFINE_list("domains", None, "data.domains instead of the workdir's."),
            ("data", "objective"): flags.DEFINE_string("objective", None, "data.objective instead of the workdir's."),
            ("data", "directory"): flags.DEFINE_string("directory", None, "data.directory instead of the workdir's."),
            ("data", "sequence_length"): flags.DEFINE_integer(
                "sequence_length", None, "Tokens per row instead of the workdir's."
            ),
            ("train", "batch_size"): flags.DEFINE_integer("batch_size", None, "Batch size instead of the workdir's."),
        }

    @property
    def path(self) -> str:
        """Path of the workdir."""
        return str(self._workdir.value)

    @property
    def is_given(self) -> bool:
        """Whether there is a workdir at all, for programs that need none."""
        return self._workdir.value is not None

    @property
    def step(self) -> int | None:
        """Step of the checkpoint; None: the newest."""
        return self._step.value

    @property
    def others(self) -> tuple[flags.FlagHolder, ...]:
        """All flags but the workdir itself."""
        return self._step, *self._instead.values()

    @property
    def instead(self) -> dict[tuple[str, str], Any]:
        """Settings to override, for :func:`moe.training.open_workdir.open_workdir`; None: not given."""
        return {field: flag.value for field, flag in self._instead.items()}


def config_layers(flag: flags.FlagHolder) -> tuple[Settings, Settings, Settings]:
    """Settings of the checkpoint that the run starts from, of the config file, and of the command line.

    Raises:
        ConfigError: see :func:`moe.config.command_line.layers`.
    """
    from moe.config import command_line

    workdir = flags.FLAGS["workdir"].value if "workdir" in flags.FLAGS else None
    return command_line.layers(flag.value, command_line.split(_arguments(sys.argv))[1], workdir or "")


def load_config(flag: flags.FlagHolder) -> Config:
    """Build the config of the flag.

    Raises:
        ConfigError: see :func:`config_layers` and :func:`moe.config.parse.from_config_dict`.
    """
    from moe.config import command_line

    checkpoint, file, own = config_layers(flag)
    return command_line.build_layers(checkpoint, file, own, _shorter_warm_up(file, own))


def run(main: Callable[[], None], required: tuple[str, ...] = (), examples: tuple[str, ...] = ()) -> None:
    """Parse flags and call main; a user's mistake ends in one sentence, with a traceback only under --traceback.

    Args:
        main: called without arguments after flags are parsed.
        required: names of flags that must be set. Without --config, a program that needs --config and --workdir uses
            the config.json of the workdir, if there is one.
        examples: commands for --help.
    """
    if "--version" in sys.argv[1:]:
        print(f"moe-jax {moe.__version__}")
        sys.exit(0)
    if process.asks_for_help(sys.argv):
        with process.closed_output_exits():
            print(help_text(main.__module__, required, examples), flush=True)
        sys.exit(0)
    process.raise_on_stop_signals()
    process.harden_streams()
    if problem := _problem(sys.argv, required, examples):
        sys.exit(terminal(f"error: {problem}"))
    _extend_import_path(sys.argv)
    flags.mark_flags_as_required(list(required))
    for name in required:
        flags.register_validator(name, bool, "must not be empty")

    def parse(argv: list[str]) -> list[str]:
        try:
            return _parse(argv, required)
        except (ConfigError, flags.Error, OSError) as error:
            if "--traceback" in argv:
                raise
            sys.exit(terminal(f"error: {_missing(error, required, examples) or ConfigError(str(error))}"))

    def guarded(argv: list[str]) -> None:
        del argv
        # Orbax, Grain and TFDS log every operation at INFO.
        logging.set_verbosity(logging.WARNING)
        for library in ("gcsfs", "google", "asyncio"):  # log tracebacks of the errors that they also raise
            standard_logging.getLogger(library).setLevel(standard_logging.CRITICAL)
        try:
            with process.closed_output_exits():
                main()
        except Exception as error:
            sentence = _refusal(error)
            if _TRACEBACK.value or not sentence:
                raise
            sys.exit(terminal(f"error: {sentence}"))

    app.run(guarded, flags_parser=parse)


def _problem(argv: list[str], required: Sequence[str], examples: Sequence[str]) -> str:
    """Sentence on the first flag that is unknown, or on those that are needed and missing; "" if there is none."""
    given = _given(_arguments(argv)[1:])
    known = {*flags.FLAGS, *(f"no{name}" for name in flags.FLAGS if flags.FLAGS[name].boolean)}
    for name in given:
        if name not in known and not name.startswith(("config.", "noconfig.")):
            near = difflib.get_close_matches(name, known, n=1)
            nearest = f"config.{_SYNONYMS[name]}" if name in _SYNONYMS else near[0] if near else ""
            hint = f"did you mean --{nearest}?" if nearest else "--help shows all options"
            return f"--{name}: no such option; {hint}"
    missing = [name for name in required if name not in given]
    if "workdir" in given:  # which may hold a config
        missing = [name for name in missing if name != "config"]
    return _needed(missing, examples)


def _given(words: Sequence[str]) -> list[str]:
    """Names of the flags in a command line, without their values."""
    names = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            break
        if not word.startswith("-") or word[1:2].isdigit():  # a value, perhaps negative
            continue
        name, equals, _ = word.lstrip("-").partition("=")
        names.append(name)
        if not equals and name in flags.FLAGS and not flags.FLAGS[name].boolean:
            next(rest, None)
    return names


#: Other programs' options, by the setting that they are here.
_SYNONYMS = {
    "lr": "optimizer.learning_rate",
    "learning_rate": "optimizer.learning_rate",
    "batch_size": "train.batch_size",
    "steps": "train.num_steps",
    "num_steps": "train.num_steps",
    "seed": "seed",
    "dataset": "data.dataset",
}


def _shorter_warm_up(file: Settings, own: Settings) -> dict[str, Any]:
    """A warm-up of a tenth of the steps, where a short trial would end before the config's warm-up is over."""
    name, steps = "optimizer.warmup_steps", own.get("train.num_steps")
    if name in own or not isinstance(steps, int):
        return {}
    from moe.config import OptimizerConfig

    warm_up = file.get(name, OptimizerConfig().warmup_steps)
    if not 0 < steps <= warm_up:
        return {}
    print(f"{name}={steps // 10} instead of the config's {warm_up}, for train.num_steps={steps}", file=sys.stderr)
    return {name: steps // 10}


def _value_of(argv: list[str], name: str) -> str | None:
    """Last value of --name=VALUE or --name VALUE in a command line; None if it is not given."""
    found = None
    for argument, following in itertools.zip_longest(argv[1:], argv[2:], fillvalue=""):
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag == name:
            found = value if equals else following
    return found


def _extend_import_path(argv: list[str]) -> None:
    """Make modules that the user names, such as gates, importable from the config file's folder."""
    from moe.config import extend_import_path

    if path := _value_of(argv, "config"):
        extend_import_path(path.partition(":")[0])


def _refusal(error: Exception) -> str:
    """Sentence for an error of a setting, a disk, a bucket, memory or missing devices; "" for other errors."""
    from moe.parallel import target
    from moe.system.atomic_files import first_line, is_bucket_error

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or 'a file'}: {error.strerror}; free space, and run the same command again"
    if isinstance(error, (ConfigError, OSError)) or is_bucket_error(error):
        return str(ConfigError(str(error) or type(error).__name__))
    if target.is_out_of_memory(error):
        return f"out of memory; more devices, smaller batches or shorter rows need less ({first_line(error)})"
    if isinstance(error, (RuntimeError, AssertionError)) and _from_jax_backends(error):
        reason = str(error).partition(" (you may")[0] or "no such device on this machine"
        return f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}: {' '.join(reason.split())}"
    return ""


def _from_jax_backends(error: Exception) -> bool:
    """True for an error of JAX's search for devices, which raises bare assertions too."""
    return traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py")


def _missing(error: Exception, required: Sequence[str], examples: Sequence[str]) -> str:
    """One sentence with all required flags that were not given; empty for another error."""
    names = [name for name in required if not flags.FLAGS[name].present]
    return _needed(names, examples) if "must have a value other than None" in str(error) else ""


def _needed(missing: Sequence[str], examples: Sequence[str]) -> str:
    """Sentence on flags that are needed; "" if there are none."""
    if not missing:
        return ""
    names = [f"--{name}" for name in missing]
    example = f", as in {examples[0]}" if examples else ""
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} needed{example}; --help shows all options"


def _parse(argv: list[str], required: Sequence[str]) -> list[str]:
    from moe.config import allow_modules, command_line

    argv = _arguments(argv)
    allow_modules(filter(None, (_value_of(argv, "allow_module") or "").split(",")))
    rest = flags.FLAGS(_with_config_file(command_line.split(argv)[0], required))
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"--{name}={value}: must be a finite number")
    if len(rest) > 1:
        raise flags.Error(f"unexpected arguments {rest[1:]}; options start with --")
    return rest


def _arguments(argv: Sequence[str]) -> list[str]:
    """The command line with the words of the files that --flagfile names."""
    return flags.FLAGS.read_flags_from_files(argv, force_gnu=False)


def _with_config_file(argv: list[str], required: Sequence[str]) -> list[str]:
    """The command line with --config: that of the workdir's run, where it is needed and not given.

    Raises:
        ConfigError: there is no such file; the message has the nearest name.
    """
    from etils import epath

    path = _value_of(argv, "config")
    if path is None:
        workdir = _value_of(argv, "workdir")
        if not workdir or not {"config", "workdir"} <= set(required):
            return argv
        path = os.fspath(epath.Path(os.path.expanduser(workdir)) / "config.json")
        if not epath.Path(path).exists():
            raise ConfigError(
                f"--config is needed: --workdir={workdir} holds no run to continue (no config.json). Give a name of "
                "`moe configs`, as --config=quickstart, or a file; --help shows examples"
            )
        return [*argv, f"--config={path}"]
    if path.endswith(".json") and epath.Path(path).exists():
        return argv
    found = shipped.find(path)
    file = found.partition(":")[0]
    if file and not os.path.isfile(file):
        near = _nearest_file(file)
        hint = f"did you mean {near}?" if near else "`moe configs` lists the names of those that are installed"
        raise ConfigError(f"--config={path}: no such file; {hint}")
    if found != path:
        program, *rest = without_flags(argv, "config")
        return [program, f"--config={found}", *rest]
    return argv


def without_flags(argv: list[str], *names: str) -> list[str]:
    """The command line without these flags and their values, ``--name=value`` or ``--name value``."""
    rest, words = [], iter(argv)
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        if word.startswith("-") and name in names:
            if not equals:
                next(words, None)
        else:
            rest.append(word)
    return rest


def _nearest_file(path: str) -> str | None:
    """The config with the most similar name, of the same folder or installed; None: none is similar."""
    if os.path.isdir(path):
        inside = os.path.join(path, "config.json")
        return inside if os.path.isfile(inside) else None
    stems = {file.stem: str(file) for file in sorted(Path(path).parent.glob("*.py")) if file.stem != "__init__"}
    stems |= {name: name for name in shipped.describe()}
    near = difflib.get_close_matches(Path(path).stem, list(stems), n=1)
    return stems[near[0]] if near else None
