"""Objects of a user's own modules, named in a config as ``module:object``."""

from __future__ import annotations

import difflib
import importlib
import typing

from moe.config.schema import ConfigError


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
    try:
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
