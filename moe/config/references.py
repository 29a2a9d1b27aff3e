"""Small files, Python files, and objects of modules as ``module:object``, that a user's config names.

A config that a user wrote may name any module. One that is read from a workdir is data, perhaps from someone else: it
may name only modules that the user also named, in a config of this process or on the command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.machinery
import importlib.util
import itertools
import os
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path

from moe.config.named_modules import NAMED_MODULES
from moe.system.fields import ConfigError, exits_as_errors, raised_as_errors, require

#: Modules that the user named, and the one of the package's gates.
_allowed: set[str] = {"moe.routing.gates"}


def allow_modules(names: Iterable[str]) -> None:
    """Allow configs of workdirs to name these modules, and modules of these packages."""
    _allowed.update(names)


def refuse_modules(fields: Mapping[str, object], where: str = "") -> None:
    """Refuse modules that a workdir names and the user did not.

    Args:
        fields: name → value, or values; values that are not text are ignored.
        where: beginning of the message.

    Raises:
        ConfigError: such a module, with the flag that allows it.
    """
    for field, value in fields.items():
        for name in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(name, str) or ":" not in name:
                continue
            module = name.partition(":")[0]
            packages = itertools.accumulate(module.split("."), "{}.{}".format)
            if _allowed.isdisjoint(packages):
                raise ConfigError(
                    f"{where}{field}={name!r} is code of a module that this command does not name; if you trust it, "
                    f"add --allow_module={module}{_on_path(module)}"
                )


def _on_path(module: str) -> str:
    """Further flags and paths by which a command imports a module; nothing is imported to find out."""
    package = module.partition(".")[0]
    with contextlib.suppress(FileNotFoundError):  # the current directory was deleted
        if any(os.path.exists(os.path.join(os.getcwd(), f"{package}{end}")) for end in ("", ".py")):
            return ""
    if importlib.util.find_spec(package) is not None:
        return ""
    return f", and begin the command with PYTHONPATH=DIR, where DIR is the folder that has {package}"


def import_object(field: str, name: str) -> typing.Any:
    """Import what ``module:object`` names, from PYTHONPATH, the current directory or beside the config file.

    Args:
        field: of the config, for messages.
        name: value of the field.

    Raises:
        ConfigError: a malformed name, a module that cannot be imported, or no such object in it.
    """
    where = f"{field}={name!r}"
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise ConfigError(f"{where}: must be module:object, such as my_module:my_function")
    _allowed.add(module_name)
    with contextlib.suppress(FileNotFoundError):  # the current directory was deleted
        NAMED_MODULES.search(os.getcwd())
    NAMED_MODULES.name(module_name)
    try:
        with exits_as_errors():
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"{where}: importing {module_name} failed: {error}") from error
        raise ConfigError(
            f"{where}: no module {error.name!r} on PYTHONPATH, in the current directory, or beside the config file"
        ) from error
    except Exception as error:  # a user's module may raise anything
        raise ConfigError(f"{where}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    found = getattr(module, attribute, None)
    if found is None:
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{where}: module {module_name!r} has no {attribute!r}{hint}")
    return found


def import_instance(field: str, name: str, kind: type) -> typing.Any:
    """Import an object as :func:`import_object` does; of a subclass of ``kind``, make an instance with its defaults.

    Raises:
        ConfigError: it cannot be imported, or a field of the class has no default.
    """
    value = import_object(field, name)
    if isinstance(value, type) and issubclass(value, kind):
        with raised_as_errors(f"{field}={name!r}: {value.__name__}()"):
            value = value()
    return value


def import_named(field: str, name: str, kind: type) -> typing.Any:
    """Import an instance of a dataclass that has a field ``name``, and set that to the given name.

    Raises:
        ConfigError: see :func:`import_instance`, or the object is no instance of ``kind``.
    """
    value = import_instance(field, name, kind)
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise ConfigError(f"{field}={name!r}: must be {article} {kind.__name__}, not {type(value).__name__}")
    return dataclasses.replace(value, name=name)


def code_fields(tree: object) -> dict[str, object]:
    """Field → value of the fields of a config, given as nested dicts, that may name a module; None where absent."""
    gates = _at(tree, "model", "moe", "layer_gates")
    return {
        "model.moe.gate": _name(_at(tree, "model", "moe", "gate")),
        "model.moe.layer_gates": [_name(gate) for gate in gates] if isinstance(gates, (list, tuple)) else gates,
        "model.mixer": _name(_at(tree, "model", "mixer")),
        "data.objective": _at(tree, "data", "objective"),
        "optimizer.name": _at(tree, "optimizer", "name"),
        "train.writers": _at(tree, "train", "writers"),
    }


def _name(value: object) -> object:
    """Name of a gate or a mixer that is given as a name or as a section."""
    return value if isinstance(value, str) else _at(value, "name")


def _at(node: object, *names: str) -> object:
    for name in names:
        node = node.get(name) if isinstance(node, dict) else None
    return node


#: Schemes of remote paths that etils.epath reads.
SCHEMES = ("gs", "s3", "az", "hf")


def check_path(field: str, path: str) -> None:
    """Raise a ConfigError for a URL whose scheme etils.epath does not read, or that lacks a bucket or a slash."""
    scheme, found, rest = path.partition(":/")
    remote = found and (scheme in SCHEMES or rest.startswith("/"))
    good = scheme in SCHEMES and rest.startswith("/") and rest.strip("/")
    allowed = f"must be a path, or one of {', '.join(SCHEMES)} before :// and a bucket"
    require(not remote or bool(good), field, path, allowed)


def load_python_file(path: str | os.PathLike[str]) -> types.ModuleType:
    """Run a Python file, such as a config or a suite, in any folder; it may import files beside it."""
    extend_import_path(path)
    loader = importlib.machinery.SourceFileLoader(f"file_{Path(path).stem}", os.fspath(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def extend_import_path(path: str | os.PathLike[str]) -> None:
    """Extend the import path by the folders from which a Python file may import: its package's, then its own. The
    folder of another file, such as a run's config.json, is searched only for modules that the user names."""
    folder = Path(path).resolve().parent
    if Path(path).suffix != ".py":
        NAMED_MODULES.search(folder)
        return
    package = folder
    while (package / "__init__.py").exists():
        package = package.parent
    for place in (package, folder):
        if str(place) not in sys.path:
            sys.path.append(str(place))
