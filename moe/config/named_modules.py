"""Import of the modules that a user named from folders that may also hold someone else's files.

The current directory is often a downloaded folder. On ``sys.path`` it would also be searched for the optional packages
that JAX, Orbax and other libraries look for, so that a ``torch.py`` in it would run.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FrameType


class NamedModules(MetaPathFinder):
    """Finds modules that were named, and what the modules found in this way import, in folders added by :meth:`search`;
    the last of ``sys.meta_path``."""

    def __init__(self) -> None:
        self._folders: list[str] = []
        self._named: set[str] = set()

    def search(self, folder: str | os.PathLike[str]) -> None:
        """Search a folder too, after all others."""
        path = os.path.abspath(folder)
        if path not in self._folders:
            self._folders.append(path)
        if self not in sys.meta_path:
            sys.meta_path.append(self)

    def name(self, module: str) -> None:
        """Allow a module to be found, with its package. This package is found without, and what it imports if it is
        installed must not be looked for in these folders."""
        package = module.partition(".")[0]
        if package != __name__.partition(".")[0]:
            self._named.add(package)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """See :class:`importlib.abc.MetaPathFinder`; submodules are found by their packages' own paths."""
        del target
        if path is not None or (fullname not in self._named and _importer() not in self._named):
            return None
        spec = PathFinder.find_spec(fullname, self._folders)
        if spec is not None:
            self._named.add(fullname)
        return spec


def _importer() -> str:
    """Top-level name of the module whose code runs the import."""
    frame: FrameType | None = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] != "importlib":
            return name.partition(".")[0]
        frame = frame.f_back
    return ""


#: The finder of this process.
NAMED_MODULES = NamedModules()
