"""Text columns of Parquet and Arrow files, memory-mapped. Needs the optional package pyarrow."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from moe.config import ConfigError
from moe.data import rollouts
from moe.data.documents import EXPECTED_FIELDS, TOOLS, check_domain, make_document, text_fields
from moe.system.foreign_files import dumps

SUFFIXES = (".parquet", ".arrow")
_BATCH = 1_000  # rows
#: Columns that may be lists of numbers or structures instead of JSON.
LIST_COLUMNS = ("messages", *rollouts.FIELDS, *rollouts.ROW_FIELDS)


class TextTable:
    """Local Arrow file (stream or file format) with string columns.

    The columns are those of :data:`moe.data.documents.TEXT_FIELDS`, and optionally ``domain``; ``messages`` is a list
    of structures, or JSON; ``tools`` is JSON.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Open the file at the first read."""
        self._path = os.fspath(path)

    def __str__(self) -> str:
        return self._path

    @functools.cached_property
    def _table(self) -> Any:
        pa = _pyarrow(self._path)
        try:
            return pa.ipc.open_stream(pa.memory_map(self._path)).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(pa.memory_map(self._path)).read_all()

    def __getitem__(self, row: int) -> str:
        """Return the text of a row; OSError or ValueError if the file is damaged."""
        table = self._table
        fields = text_fields(table.column_names)
        return make_document(fields, [table[column][row].as_py() for column in fields])

    def rows(self, name: str) -> Iterator[tuple[int, str, str | None]]:
        """Yield (row, text, domain or None) of the rows whose text is not blank.

        Args:
            name: path of the source, for messages.

        Raises:
            ConfigError: the file is damaged, or a column has the wrong type; file and row are named.
        """
        pa = _pyarrow(name)
        row = 0
        try:
            table = self._table
            columns = _check_columns(pa, table.schema, name)
            texts = text_fields(columns)
            for batch in table.select(columns).to_batches(max_chunksize=_BATCH):
                batch.validate(full=True)
                values = batch.to_pydict()
                domains = values.get("domain") or [None] * len(batch)
                for *parts, domain in zip(*(values[column] for column in texts), domains, strict=True):
                    for column, part in zip(texts, parts, strict=True):
                        if part is None and column != TOOLS:
                            raise ConfigError(f"{name}, row {row}: {column} is null")
                    try:
                        text = make_document(texts, parts)
                    except ValueError as error:
                        raise ConfigError(f"{name}, row {row}: {error}") from error
                    if domain is not None:
                        check_domain(domain, f"{name}, row {row}")
                    if text.strip():
                        yield row, text, domain
                    row += 1
        except ConfigError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _damaged(name, error) from error


def copy_columns(source: epath.Path, target: Path) -> None:
    """Copy the columns that :class:`TextTable` reads from a Parquet or Arrow file to an Arrow stream file.

    Raises:
        ConfigError: the source is damaged, or a column has the wrong type.
    """
    pa = _pyarrow(os.fspath(source))
    try:
        with source.open("rb") as file:
            if source.suffix.lower() == ".parquet":
                reader = pa.parquet.ParquetFile(file)
                schema, batches = reader.schema_arrow, functools.partial(reader.iter_batches, _BATCH)
            else:
                table = pa.ipc.open_stream(file).read_all()
                schema, batches = table.schema, lambda columns: table.select(columns).to_batches(_BATCH)
            columns = _check_columns(pa, schema, os.fspath(source))
            kept = pa.schema([(name, pa.large_string()) for name in columns])
            with pa.OSFile(os.fspath(target), "wb") as out, pa.ipc.new_stream(out, kept) as writer:
                for batch in batches(columns=columns):
                    arrays = [_as_strings(pa, batch.column(name)) for name in columns]
                    writer.write_batch(pa.record_batch(arrays, schema=kept))
    except ConfigError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk; others are about metadata
            raise
        raise _damaged(os.fspath(source), error) from error


def _check_columns(pa: Any, schema: Any, name: str) -> list[str]:
    """Return the columns to read."""
    texts = text_fields(schema.names)
    if not set(texts) <= set(schema.names):
        raise ConfigError(f"{name}: needs columns that are {EXPECTED_FIELDS}; it has {schema.names}")
    columns = [*texts, *(["domain"] if "domain" in schema.names else [])]
    for column in columns:
        if schema.names.count(column) > 1:
            raise ConfigError(f"{name}: has {schema.names.count(column)} columns named {column!r}; keep one")
        kind = schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if column in LIST_COLUMNS and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            continue
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            # Structures of a list have the fields of all, so that a tool would get those of others.
            json = " of JSON" if column == TOOLS else ""
            raise ConfigError(f"{name}: column {column!r} must be of strings{json}, not {kind}")
    return columns


def _as_strings(pa: Any, column: Any) -> Any:
    """A column as strings; lists become JSON."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        values = [None if value is None else dumps(value) for value in column.to_pylist()]
        return pa.array(values, pa.large_string())
    return column.cast(pa.large_string())


def _damaged(name: str, error: Exception) -> ConfigError:
    return ConfigError(f"{name}: cannot be read as a table ({' '.join(str(error).split())[:200]})")


def _pyarrow(name: str) -> Any:
    try:
        import pyarrow  # noqa: PLC0415
        import pyarrow.ipc  # noqa: PLC0415
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(f"{name}: reading this file needs pyarrow; install it with pip install pyarrow") from error
    return pyarrow
