"""The source code of a user's gates, mixers, layers, objective and optimizer, which decides a result as fields do."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

from moe.config.references import import_object
from moe.config.schema import Config

#: A module and a name that it defines at its top level; :data:`_ALL`: the whole module.
_Place = tuple[str, str]
_ALL = "*"
#: Statements that define no name, such as ``table.append(1)``.
_NO_NAME = ""
#: Folders of installed packages.
_INSTALLED = {"site-packages", "dist-packages"}


def user_code(config: Config) -> str:
    """Hash of the code of a user's gates, mixer, layers, objective and optimizer; empty if the config names none.

    The code is what their definitions reach by name: in their modules, and in modules that these import. Comments,
    docstrings and formatting are not part of it, nor is any package that is installed.
    """
    start = _named(config)
    text = "\n".join(f"{module}:{name}\n{code}" for (module, name), code in sorted(_reached(start).items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""


def user_modules(config: Config) -> set[str]:
    """Names of the modules whose code :func:`user_code` is about."""
    start = _named(config)
    return {module for module, _ in (*start, *_reached(start))}


def _named(config: Config) -> list[_Place]:
    """Definitions outside of the package that the config names."""
    model = config.model
    values = [value for value in (*model.moe.gates, model.mixer) if value is not None and ":" in value.name]
    places = [(type(value).__module__, type(value).__qualname__) for value in values]
    for field, path in (("data.objective", config.data.objective), ("optimizer.name", config.optimizer.name)):
        if ":" in path:
            import_object(field, path)
            module, _, name = path.partition(":")
            places.append((module, name))
    return places


def _reached(start: Iterable[_Place]) -> dict[_Place, str]:
    """Source of what the places reach, themselves included."""
    found: dict[_Place, str] = {}
    todo = list(start)
    packages = {module.partition(".")[0] for module, _ in todo}
    while todo:
        module, name = place = todo.pop()
        if place in found or not _is_own(module, packages):
            continue
        statements = _statements(sys.modules[module], name)
        found[place] = "\n".join(map(ast.unparse, statements))
        todo += [(module, _NO_NAME), *(used for statement in statements for used in _uses(statement, module))]
    return {place: code for place, code in found.items() if code}


def _is_own(name: str, packages: set[str]) -> bool:
    """Return True for a module of the user: of one of these packages, or outside of the folders of installed ones."""
    module, package = sys.modules.get(name), name.partition(".")[0]
    if package == "moe" or package in sys.stdlib_module_names or module is None:
        return False
    file = inspect.getsourcefile(module) if getattr(module, "__file__", None) else None
    return file is not None and (package in packages or _INSTALLED.isdisjoint(Path(file).parts))


def _statements(module: types.ModuleType, name: str) -> list[ast.stmt]:
    """Statements at the top level of a module that define a name."""
    statements = _parse(module)
    if name == _ALL or "<locals>" in name:  # a class that a function made
        return [statement for statement, _ in statements]
    name = name.partition(".")[0]  # of a class inside of a class
    return [statement for statement, names in statements if (name in names if name else not names)]


@functools.cache  # a process runs the source that it imported, even if the file changes
def _parse(module: types.ModuleType) -> list[tuple[ast.stmt, set[str]]]:
    """Statements at the top level of a module, without docstrings, and the names that each defines."""
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body[:1] = [] if node.body[1:] or isinstance(node, ast.Module) else [ast.Pass()]
    return [(statement, set(_defines(statement))) for statement in tree.body]


def _defines(statement: ast.stmt) -> Iterator[str]:
    """Names that a statement defines, also inside of an ``if`` or the like."""
    definition = isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    for node in [statement] if definition else ast.walk(statement):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.alias():
                yield node.asname or node.name.partition(".")[0]
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case _:
                pass


def _uses(statement: ast.stmt, module: str) -> Iterator[_Place]:
    """Places that a statement of a module reads or imports."""
    package = sys.modules[module].__package__
    for node in ast.walk(statement):
        match node:
            case ast.Name():
                yield module, node.id
            case ast.Import():
                yield from ((alias.name, _ALL) for alias in node.names)
            case ast.ImportFrom():
                origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                for alias in node.names:
                    inner = f"{origin}.{alias.name}"
                    yield (inner, _ALL) if inner in sys.modules else (origin, alias.name)
            case _:
                pass
