"""Readers of JSON and of npz files that a crash, an edit or another program may have changed: one sentence each."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from typing import Annotated, Any, NoReturn

import numpy as np
import pydantic

from moe.config import ConfigError, read_small_file

Json = dict[str, Any]
_OBJECT: pydantic.TypeAdapter[Json] = pydantic.TypeAdapter(Json)
_LIST: pydantic.TypeAdapter[list[Any]] = pydantic.TypeAdapter(list[Any])
#: A number of steps done.
Step = Annotated[int, pydantic.Field(ge=0, lt=1 << 53)]

#: Finite numbers.
Amount = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]


def _in_order(ends: list[float]) -> list[float]:
    if ends[0] > ends[1]:
        raise ValueError("must be the lower end, then the upper")
    return ends


#: Two ends.
Interval = Annotated[list[Positive], pydantic.Field(min_length=2, max_length=2), pydantic.AfterValidator(_in_order)]


class Fields(pydantic.BaseModel):
    """Base of schemas: strict types; unknown fields are ignored."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())


def kept_whole(schema: type[Fields]) -> pydantic.TypeAdapter[Json]:
    """The schema of JSON objects that have the fields of another one, and are kept as they are, with all others."""

    def check_fields(tree: Any) -> Any:
        schema.model_validate(tree)
        return tree

    return pydantic.TypeAdapter(Annotated[Json, pydantic.BeforeValidator(check_fields)])


def read_json[T](path: str | os.PathLike[str], schema: pydantic.TypeAdapter[T]) -> T:
    """The content of a JSON file.

    Raises:
        ConfigError: no such file, no JSON, or not of the schema; see :func:`moe.config.read_small_file` too.
    """
    return parse(read_small_file(path), schema, os.fspath(path))


def read_rows(path: str | os.PathLike[str], schema: pydantic.TypeAdapter[Json]) -> list[Json]:
    """The JSON objects of a list in a file, each of the schema. Raises ConfigError; see :func:`read_json`."""
    rows = read_json(path, _LIST)
    return [check(row, schema, f"{os.fspath(path)}, entry {number}") for number, row in enumerate(rows, 1)]


def read_object(path: str | os.PathLike[str]) -> Json:
    """The JSON object in a file, whatever it holds. Raises ConfigError; see :func:`read_json`."""
    return read_json(path, _OBJECT)


#: A file may unpack to this many bytes, and to this many times its own.
_UNPACKED, _RATIO = 1 << 28, 100


def read_arrays(path: str | os.PathLike[str], name: str = "") -> dict[str, np.ndarray]:
    """The arrays of an npz file, which are numbers or booleans.

    Args:
        path: local.
        name: of the file in messages; empty: its path.

    Raises:
        ConfigError: no such file, no npz file, or one of something else, or one that would fill the memory.
    """
    name = name or os.fspath(path)
    if not os.path.isfile(path):  # reading a FIFO waits for ever
        raise ConfigError(f"{name}: {'is not a regular file' if os.path.lexists(path) else 'no such file'}")
    try:
        with zipfile.ZipFile(path) as packed:
            members = [member.filename for member in packed.infolist()]
            size = sum(member.file_size for member in packed.infolist())
        if size > max(_UNPACKED, _RATIO * os.path.getsize(path)):
            raise ValueError(f"it would unpack to {size:,} bytes")
        if len(set(members)) < len(members):
            raise ValueError("two arrays have one name")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        EOFError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ConfigError(f"{name}: not a readable npz file of arrays ({first_sentence(error)})") from error
    except MemoryError as error:
        raise ConfigError(f"{name}: has an array that does not fit into memory") from error
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            kind = getattr(array, "dtype", type(array).__name__)
            raise ConfigError(f"{name}: {key} is of type {kind}, must be real numbers or booleans")
    return arrays


def loads(content: bytes | str) -> Any:
    """The value of JSON. Raises ValueError, for two values of one name too, or RecursionError."""

    def once(pairs: list[tuple[str, Any]]) -> Json:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"two values of {next(name for name in names if names.count(name) > 1)!r}")
        return found

    return json.loads(content, object_pairs_hook=once)


def parse[T](content: bytes | str, schema: pydantic.TypeAdapter[T], where: str) -> T:
    """JSON of a schema.

    Args:
        content: UTF-8.
        schema: of the value.
        where: beginning of messages.

    Raises:
        ConfigError: it is no JSON, or not of the schema.
    """
    try:
        tree = loads(content)
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, numbers without end, nested too deeply
        raise ConfigError(f"{where}: not JSON ({first_sentence(error)})") from error
    return check(tree, schema, where)


def check[T](tree: Any, schema: pydantic.TypeAdapter[T], where: str) -> T:
    """A value of a schema. Raises ConfigError: one sentence that names the first wrong field."""
    try:
        return schema.validate_python(tree)
    except pydantic.ValidationError as error:
        refuse(where, error)


def refuse(where: str, error: pydantic.ValidationError) -> NoReturn:
    """Raise ConfigError: one sentence that names the first wrong field."""
    raise ConfigError(f"{where}: {first_sentence(error)}") from None


def first_sentence(error: Exception) -> str:
    """Message of an error; of a failed validation, that on the first wrong field."""
    if not isinstance(error, pydantic.ValidationError):
        return f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"has no {name}"
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = message.partition(" or instance of")[0].replace("a valid dictionary", "a JSON object")
    message = message.replace("a valid integer", "an integer").replace("a valid ", "a ")
    return f"{name}={_shorten(first['input'])}: {message}" if name else message


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
