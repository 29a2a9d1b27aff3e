"""Atomic writing of files and new folders, and JSON that carries its own checksum."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import secrets
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from moe.system.escaping import terminal
from moe.system.fields import ConfigError
from moe.system.stop_watch import STOP_WATCH

#: Error numbers of a lock request on a file system without locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """True for a path like gs://bucket/name: without appends, renames of folders or locks."""
    return "://" in os.fspath(path)


def is_bucket_error(error: BaseException) -> bool:
    """True for an error of the libraries that access buckets; most of these are not OSErrors."""
    return type(error).__module__.partition(".")[0] in ("gcsfs", "fsspec", "google", "requests", "aiohttp")


def write_atomic(path: epath.Path | Path, content: bytes | str | Iterable[bytes]) -> None:
    """Create or replace a file in one step: a reader, or a crash, sees the old content or the new, never a part.

    The content goes to a new file beside it, ``PATH.XXXXXXXX.tmp``, which is renamed once the disk has it. Of several
    programs that write a path at once the last one to rename decides. What a killed program has left, the next one
    removes. In a bucket an object appears whole, or not at all. A link at the path is replaced, never followed.

    Args:
        path: of the file.
        content: bytes, their parts, or text, which is encoded as UTF-8 with lone surrogates escaped.

    Raises:
        ConfigError: the path is a device, such as /dev/null, which the file would replace.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    if in_bucket(path):
        path.write_bytes(content if isinstance(content, bytes) else b"".join(content))
        return
    mode = os.stat(path).st_mode if os.path.exists(path) else 0
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise ConfigError(f"{path}: is a device, and must be a file")
    with STOP_WATCH.unfinished():
        _remove_abandoned(Path(path))
        try:
            with _temporary(Path(path)) as file:
                file.writelines([content] if isinstance(content, bytes) else content)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(path)
        except OSError as error:  # of a full disk it names no file
            if error.filename is None or _TEMPORARY.search(os.fspath(error.filename)):
                raise OSError(error.errno, error.strerror, os.fspath(path)) from None
            raise


#: End of the name of a temporary file.
_TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp$")
#: Characters of the path's own name before it: a name has at most 255 bytes.
_STEM = 60


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[BinaryIO]:
    """A new file beside ``path``, whose lock is held while it is open, and which is removed if the block fails."""
    while True:
        temporary = path.with_name(f"{path.name[:_STEM]}.{secrets.token_hex(4)}.tmp")
        with open(temporary, "xb", opener=_new) as file:
            lock(file.fileno(), fcntl.LOCK_EX)
            if not os.fstat(file.fileno()).st_nlink:  # not locked yet, another program took it for an abandoned one
                continue
            try:
                yield file
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            return


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of a path whose writers were killed: nobody holds their locks."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return  # the writer says what is wrong with the folder
    stem = path.name[:_STEM]
    for name in names:
        if name.startswith(f"{stem}.") and _TEMPORARY.fullmatch(name, len(stem)):
            with contextlib.suppress(OSError), open(path.with_name(name), "r+b", opener=_new) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails, also where a file system has no locks
                os.unlink(path.with_name(name))


def write_figure(path: epath.Path | Path, figure: Any, dpi: int, **options: Any) -> None:
    """Write a figure of matplotlib as PNG, as :func:`write_atomic` does; text that no font can draw is escaped."""
    for text in figure.findobj(lambda artist: hasattr(artist, "get_text")):
        text.set_text(terminal(text.get_text()))
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format="png", **options)
    write_atomic(path, content.getvalue())


def append(path: Path, text: str) -> None:
    """Append text to a local file as UTF-8, and create it if missing. Raises OSError for a link or a FIFO."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
        file.write(text)


def lock(file: int, operation: int) -> None:
    """Lock an open file by flock, if its file system has locks. Raises OSError."""
    try:
        fcntl.flock(file, operation)  # the kernel releases it also when the process is killed
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


@contextlib.contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Wait for the lock of a file's folder, and hold it while the file is read, and written with what it held: another
    program's change in between would be lost."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def refuse_files(folder: str | os.PathLike[str]) -> None:
    """Refuse to write a folder that exists and is not empty: nothing is ever overwritten. Raises ConfigError."""
    scheme, bucket, _ = os.fspath(folder).partition("://")
    if bucket and scheme != "gs":
        raise ConfigError(f"{folder}: must be a folder of a file system, or gs://BUCKET/NAME")
    directory = epath.Path(folder)
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ConfigError(f"{directory}: must be a folder, existing and empty or new")
    held = sorted(path.name for path in directory.iterdir())
    if held:
        more = f" and {len(held) - 3} more" if len(held) > 3 else ""
        raise ConfigError(f"{directory}: must be empty or new; it holds {', '.join(held[:3])}{more}")


@contextlib.contextmanager
def new_folder(folder: epath.Path) -> Iterator[None]:
    """Create a folder that is new or empty, for this program alone; if the block fails, remove what it holds, and the
    folder and the parents that were missing, unless another program has put something there.

    Raises:
        ConfigError: it holds files, or another program is writing it.
    """
    refuse_files(folder)
    parents = () if in_bucket(folder) else folder.parents
    missing = [path for path in (folder, *parents) if not path.exists()]
    with STOP_WATCH.unfinished():
        folder.mkdir(parents=True, exist_ok=True)
        with _claimed(folder):
            try:
                yield
            except BaseException as error:
                _remove(folder, missing)
                # safetensors and TensorStore have other types for errors of the disk.
                if isinstance(error, OSError) or re.search("(?i)os.error", str(error)):
                    reason = first_line(error)
                    raise ConfigError(f"{folder}: cannot be written, and nothing was left: {reason}") from error
                raise


@contextlib.contextmanager
def _claimed(folder: epath.Path) -> Iterator[None]:
    """Lock an empty folder; the kernel releases it however the process ends. Raises ConfigError; see new_folder."""
    if in_bucket(folder):
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{folder}: another program is writing it") from error
        refuse_files(folder)  # which another program has written since the first look
        yield
    finally:
        os.close(descriptor)


def _remove(folder: epath.Path, missing: list[epath.Path]) -> None:
    """Remove the content of a folder, and those of the given folders that are empty then."""
    if in_bucket(folder):
        folder.rmtree()
        return
    for path in folder.iterdir():
        if path.is_dir() and not os.path.islink(path):
            path.rmtree()
        else:
            path.unlink()
    for path in missing:
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(path)


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """Type and first line of the root cause of an error, at most 300 characters, without TensorStore's own spec."""
    error = root_cause(error)
    line = (str(error).strip() or "no details").splitlines()[0].split(" [tensorstore_spec=")[0]
    return f"{type(error).__name__}: {line if len(line) <= 300 else f'{line[:100]} ... {line[-190:]}'}"


def _new(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def to_checked_json(content: Any) -> str:
    """JSON of {content, crc32}: a flipped bit in a number still parses as a number, and the checksum catches it."""
    return json.dumps({"content": content, "crc32": _crc32(content)})


def from_checked_json(text: str) -> Any:
    """Return the content of a text made by :func:`to_checked_json`.

    Raises:
        ValueError: the text is not JSON, or its checksum does not match.
    """
    tree = json.loads(text)
    if not isinstance(tree, dict) or tree.keys() != {"content", "crc32"} or tree["crc32"] != _crc32(tree["content"]):
        raise ValueError("its checksum does not match")
    return tree["content"]


def _crc32(content: Any) -> int:
    return zlib.crc32(json.dumps(content).encode())
