"""The reader of JSON that a crash, an edit or another program may have changed: a schema each, and one sentence."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any, NoReturn

import pydantic

from moe.config import ConfigError, read_small_file

Json = dict[str, Any]
_OBJECT: pydantic.TypeAdapter[Json] = pydantic.TypeAdapter(Json)
#: A number of steps done.
Step = Annotated[int, pydantic.Field(ge=0, lt=1 << 53)]

#: Finite numbers.
Amount = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]


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


def read_object(path: str | os.PathLike[str]) -> Json:
    """The JSON object in a file, whatever it holds. Raises ConfigError; see :func:`read_json`."""
    return read_json(path, _OBJECT)


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
