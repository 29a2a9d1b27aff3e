"""Commands with a wrong input, and functions that write such cases or damage their files."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy

TINY = (
    "--config=configs/quickstart.py",
    "--config.data.dataset=tiny_text/split",
    "--config.data.directory={data}",
    "--config.model.vocab_size=400",
    "--config.data.sequence_length=16",
    "--config.data.heldout_rows=8",
    "--workdir={new}/run",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A command, and words that its error message contains. In arguments, `{new}` is an empty folder, `{data}` prepared
    text, `{run}` an imported model and `{open}` an open checkpoint.

    `break_it` damages a copy of `{run}` or `{open}`, or puts something into `{new}`.
    """

    script: str
    arguments: tuple[str, ...]
    says: tuple[str, ...]
    break_it: Callable[[Path], None] | None = None


def main(*arguments: str, says: str | tuple[str, ...], break_it: Callable[[Path], None] | None = None) -> Case:
    """A case of main.py: these arguments, and those of TINY that they do not override."""
    given = {argument.partition("=")[0] for argument in arguments}
    tiny = [argument for argument in TINY if argument.partition("=")[0] not in given]
    ordered = sorted([*tiny, *arguments], key=lambda argument: not argument.startswith("--config="))  # first
    return Case("main.py", tuple(ordered), (says,) if isinstance(says, str) else says, break_it)


def script(
    name: str, *arguments: str, says: str | tuple[str, ...], break_it: Callable[[Path], None] | None = None
) -> Case:
    return Case(f"scripts/{name}.py", arguments, (says,) if isinstance(says, str) else says, break_it)


def command(
    name: str, *arguments: str, says: str | tuple[str, ...], break_it: Callable[[Path], None] | None = None
) -> Case:
    return Case(f"moe {name}", arguments, (says,) if isinstance(says, str) else says, break_it)


def fifo(name: str) -> Callable[[Path], None]:
    """Create a FIFO without a writer in the case's folder: reading it blocks for ever."""
    return lambda folder: os.mkfifo(folder / name)


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Put a file in the case's folder."""

    def put(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return put


def remove(name: str) -> Callable[[Path], None]:
    def take(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return take


def change(name: str, **fields) -> Callable[[Path], None]:
    """Change fields of a JSON file, and drop its checksums; a value of None removes the field."""

    def edit(folder: Path) -> None:
        tree = json.loads((folder / name).read_text()) | {"checksums": None} | fields
        (folder / name).write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))

    return edit


def rewrite(name: str, content: str) -> Callable[[Path], None]:
    """Put a small file in a workdir, and drop the workdir's checksums."""

    def edit(folder: Path) -> None:
        write(name, content)(folder)
        change(f"{Path(name).parent}/config.json")(folder)

    return edit


def cut(pattern: str, keep: float) -> Callable[[Path], None]:
    """Truncate the files of a pattern to a share of their size."""

    def truncate(folder: Path) -> None:
        paths = [path for path in folder.glob(pattern) if path.is_file()]
        assert paths, pattern
        for path in paths:
            os.truncate(path, int(keep * path.stat().st_size))

    return truncate


def rename_tensor(folder: Path) -> None:
    path = folder / "open" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    name = sorted(tensors)[0]
    safetensors.numpy.save_file({(key + "x" if key == name else key): value for key, value in tensors.items()}, path)


def turn_tensor(folder: Path) -> None:
    path = folder / "open" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["lm_head.weight"] = np.ascontiguousarray(tensors["lm_head.weight"].T)
    safetensors.numpy.save_file(tensors, path)


def value(field: str, text: str, allowed: str) -> Case:
    """A case of main.py that refuses a field's value and names the field and what is allowed."""
    return main(f"--config.{field}={text}", says=(field, allowed))
