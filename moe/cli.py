"""Command lines: flags over a config file, and errors as one sentence on stderr with exit code 1.

Importing this module imports JAX, so entry points call :mod:`moe.platform` before it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from moe import platform
from moe.config import Config, ConfigError, check_field, check_path, inherit_model, type_name
from moe.routing.resolve import from_config_dict

_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show the traceback of an error.")


def define_config(default: str | None = None) -> flags.FlagHolder:
    """Define the flag --config=FILE, whose fields --config.x.y=value overrides."""
    return config_flags.DEFINE_config_file("config", default, "File with get_config(); --config.x.y=value overrides.")


class _Path(flags.ArgumentParser):
    """Path; a leading ~ is expanded even where the shell does not."""

    syntactic_help = "a path"

    def parse(self, argument: str) -> str:
        check_path("path", argument)
        return os.path.expanduser(argument)


def define_path(name: str, explanation: str) -> flags.FlagHolder:
    """Define a flag --name=PATH, for a local or remote path."""
    return flags.DEFINE(_Path(), name, None, explanation, serializer=flags.ArgumentSerializer())


class WorkdirFlags:
    """Flags of scripts that open a workdir: its path, the checkpoint's step, and settings to override."""

    def __init__(self) -> None:
        self._workdir = define_path("workdir", "Folder of a run or an import.")
        self._step = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
        self._instead: dict[tuple[str, str], flags.FlagHolder] = {
            ("data", "dataset"): flags.DEFINE_string("dataset", None, "data.dataset instead of the workdir's."),
            ("data", "domains"): flags.DEFINE_list("domains", None, "data.domains instead of the workdir's."),
            ("data", "directory"): flags.DEFINE_string("directory", None, "data.directory instead of the workdir's."),
            ("data", "sequence_length"): flags.DEFINE_integer(
                "sequence_length", None, "Tokens per row instead of the workdir's."
            ),
            ("train", "batch_size"): flags.DEFINE_integer("batch_size", None, "Rows at once instead of the workdir's."),
        }

    @property
    def path(self) -> str:
        """Path of the workdir."""
        return str(self._workdir.value)

    @property
    def step(self) -> int | None:
        """Step of the checkpoint; None: the newest."""
        return self._step.value

    @property
    def instead(self) -> dict[tuple[str, str], Any]:
        """Settings to override, for :func:`moe.training.open_run.open_workdir`; None: not given."""
        return {field: flag.value for field, flag in self._instead.items()}


def load_config(flag: flags.FlagHolder) -> Config:
    """Build the typed config of the flag.

    Raises:
        ConfigError: see :func:`moe.routing.resolve.from_config_dict`.
    """
    tree = flag.value
    if not isinstance(tree, ml_collections.ConfigDict):
        raise ConfigError(f"--config: get_config() must return a ConfigDict, not {type(tree).__name__}")
    inherit_model(tree)
    return from_config_dict(tree)


def run(main: Callable[[], None], required: tuple[str, ...] = ()) -> None:
    """Parse flags and call main; a user's mistake ends in one sentence, with a traceback only under --traceback.

    Args:
        main: called without arguments after flags are parsed.
        required: names of flags that must be set.
    """
    platform.raise_on_stop_signals()
    _harden_streams()
    _extend_import_path(sys.argv)
    flags.mark_flags_as_required(list(required))
    for name in required:
        flags.register_validator(name, bool, "must not be empty")

    def parse(argv: list[str]) -> list[str]:
        try:
            return _parse(argv)
        except Exception as error:  # a config file is a program and may raise anything
            if "--traceback" in argv:
                raise
            sys.exit(f"error: {_sentence(error, argv)}")

    def guarded(argv: list[str]) -> None:
        del argv
        # Orbax, Grain and TFDS log every operation at INFO.
        logging.set_verbosity(logging.WARNING)
        try:
            main()
        except (ConfigError, OSError) as error:
            if _TRACEBACK.value:
                raise
            sys.exit(f"error: {' '.join(str(error).split())}")
        except (RuntimeError, AssertionError) as error:
            if _TRACEBACK.value or not _from_jax_backends(error):
                raise
            reason = str(error).partition(" (you may")[0] or "no such device on this machine"
            sys.exit(f"error: JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}: {' '.join(reason.split())}")

    app.run(guarded, flags_parser=parse)


def _extend_import_path(argv: list[str]) -> None:
    """Find a user's modules, such as gates, in the current directory and beside the config file too."""
    configs = [argument.partition("=")[2] for argument in argv[1:] if argument.lstrip("-").startswith("config=")]
    for folder in (os.getcwd(), *(os.path.dirname(os.path.abspath(path)) for path in configs if path)):
        if folder not in sys.path:
            sys.path.append(folder)


def _from_jax_backends(error: Exception) -> bool:
    """True for an error of JAX's search for devices, which raises bare assertions too."""
    return traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py")


class _TolerantStream:
    """Stream whose write errors are ignored: a full disk or a closed pipe behind stderr must not end a run."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _harden_streams() -> None:
    """Escape characters that the terminal's encoding lacks, and ignore write errors of stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = _TolerantStream(sys.stderr)


def _sentence(error: Exception, argv: list[str]) -> str:
    """One-line description of an error in the command line."""
    text = " ".join(str(error).split())
    # ml_collections re-raises errors of a config file as text that contains the traceback.
    _, found, message = text.rpartition("moe.config.schema.ConfigError: ")
    if found:
        return message
    if isinstance(error, flags.IllegalFlagValueError):
        for argument in argv[1:]:
            name, _, value = argument.lstrip("-").partition("=")
            if name.startswith("config.") and f"--{name}=" in text:
                field = name.removeprefix("config.")
                return f"{field}={value!r}: must be {type_name(field)}"
    if isinstance(error, (ConfigError, flags.Error)):
        return text
    files = [argument for argument in argv[1:] if argument.lstrip("-").startswith("config=")]
    return f"{' '.join(files) or '--config'}: {type(error).__name__}: {text}"


def _parse(argv: list[str]) -> list[str]:
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and name.startswith("config."):
            check_field(name.removeprefix("config."))
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
        raise flags.Error(f"unexpected arguments {rest[1:]}; options start with --")
    return rest
