"""Readers of JSON files that a crash, an edit or another program may have changed; an error is one sentence."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any, NoReturn

import pydantic

from moe.system.fields import ConfigError
from moe.system.reading import read_small_file

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


#: Lower and upper end.
Interval = Annotated[list[Positive], pydantic.Field(min_length=2, max_length=2), pydantic.AfterValidator(_in_order)]


class Fields(pydantic.BaseModel):
    """Base of schemas: strict types; unknown fields are ignored."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())


def kept_whole(schema: type[Fields]) -> pydantic.TypeAdapter[Json]:
    """Schema of JSON objects that must have the fields of ``schema``, and keep all their fields unchanged."""

    def check_fields(tree: Any) -> Any:
        schema.model_validate(tree)
        return tree

    return pydantic.TypeAdapter(Annotated[Json, pydantic.BeforeValidator(check_fields)])


def read_json[T](path: str | os.PathLike[str], schema: pydantic.TypeAdapter[T]) -> T:
    """The content of a JSON file.

    Raises:
        ConfigError: the file is not JSON or does not match the schema; see also :func:`.read_small_file`.
    """
    return parse(read_small_file(path), schema, os.fspath(path))


def read_rows(path: str | os.PathLike[str], schema: pydantic.TypeAdapter[Json]) -> list[Json]:
    """Read a list of JSON objects that each match the schema. Raises ConfigError; see :func:`read_json`."""
    rows = read_json(path, _LIST)
    return [check(row, schema, f"{os.fspath(path)}, entry {number}") for number, row in enumerate(rows, 1)]


def read_object(path: str | os.PathLike[str]) -> Json:
    """Read a JSON object with any fields. Raises ConfigError; see :func:`read_json`."""
    return parse_object(read_small_file(path), os.fspath(path))


def parse_object(content: bytes | str, where: str) -> Json:
    """Parse a JSON object with any fields. Raises ConfigError; see :func:`parse`."""
    return parse(content, _OBJECT, where)


def loads(content: bytes | str) -> Any:
    """Parse JSON. Raises ValueError, also for a name that an object has twice, or RecursionError."""

    def once(pairs: list[tuple[str, Any]]) -> Json:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"two values of {next(name for name in names if names.count(name) > 1)!r}")
        return found

    return json.loads(content, object_pairs_hook=once)


def dumps(value: Any, **options: Any) -> str:
    """JSON of a value, of a table for example. Raises ValueError for types that JSON lacks, such as times and bytes."""

    def refuse(part: Any) -> NoReturn:
        raise ValueError(f"holds a value of type {type(part).__name__}, which JSON lacks; make it a string")

    return json.dumps(value, ensure_ascii=False, default=refuse, **options)


def parse[T](content: bytes | str, schema: pydantic.TypeAdapter[T], where: str) -> T:
    """Parse JSON and check it against a schema.

    Args:
        content: UTF-8.
        schema: of the value.
        where: beginning of messages.

    Raises:
        ConfigError: it is not JSON, or does not match the schema.
    """
    try:
        tree = loads(content)
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, numbers without end, nested too deeply
        raise ConfigError(f"{where}: not JSON ({first_sentence(error)})") from error
    return check(tree, schema, where)


def check[T](tree: Any, schema: pydantic.TypeAdapter[T], where: str) -> T:
    """Check a value against a schema. Raises ConfigError: one sentence that names the first wrong field."""
    try:
        return schema.validate_python(tree)
    except pydantic.ValidationError as error:
        refuse(where, error)


def refuse(where: str, error: pydantic.ValidationError) -> NoReturn:
    """Raise ConfigError: one sentence that names the first wrong field."""
    raise ConfigError(f"{where}: {first_sentence(error)}") from None


def first_sentence(error: Exception) -> str:
    """Message of an error; for a failed validation, the message about the first wrong field."""
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
