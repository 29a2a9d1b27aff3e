"""Text files to documents: long texts cut into sections, JSON lines parsed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from moe.config import ConfigError
from moe.data import rollouts
from moe.system.foreign_files import dumps, first_sentence, loads

JSON_LINES = ".jsonl"
CONVERSATION = "\x1d"  # begins a document that is a list of messages, or a chosen and a rejected one, as JSON
PAIR = "\x1e"  # between source and target of a pair, which is one document
HELDOUT_FRACTION = 0.05  # share of a domain's documents that is held out
MAX_DOMAIN_NAME = 100  # characters
# characters of a text, bytes of a file
SECTION_TARGET = 10_000
SECTION_LIMIT = 18_000
SECTION_TAIL = 2_000


def sections(text: str, target: int, limit: int) -> list[str]:
    """Cut text at the first blank line after `target` characters, or at any line end after `limit`.

    The sections joined give the text. A tail shorter than 2,000 characters stays with the section before it.
    """
    parts = []
    current = []
    size = 0
    for line in text.splitlines(keepends=True):
        current.append(line)
        size += len(line)
        if size >= limit or (size >= target and not line.strip()):
            parts.append("".join(current))
            current, size = [], 0
    if tail := "".join(current):
        if parts and len(tail) < SECTION_TAIL:
            parts[-1] += tail
        else:
            parts.append(tail)
    return parts


#: Fields or columns that hold a document: a text, a conversation, or two texts.
PREFERENCE = ("chosen", "rejected")
TEXT_FIELDS = (
    ("text",), ("messages",), rollouts.FIELDS_WITH_EXPERTS, rollouts.FIELDS, rollouts.ROW_FIELDS,
    ("prompt", *PREFERENCE), PREFERENCE, ("prompt", "response"), ("source", "target")
)  # fmt: skip
#: Field or column with the tools that a conversation's answers may call, beside those of TEXT_FIELDS that hold one.
TOOLS = "tools"
_WITH_TOOLS = (("messages",), ("prompt", *PREFERENCE), PREFERENCE, ("prompt", "response"), ("source", "target"))
#: Roles of messages that are no answers.
PROMPT_ROLES = ("system", "developer", "user", "tool", "function", "ipython")
EXPECTED_FIELDS = (
    "a string 'text', a list 'messages', or strings 'prompt' and 'response', or 'source' and 'target', or 'prompt', "
    "'chosen' and 'rejected', or lists 'prompt_tokens' and 'completions'"
)


def text_fields(names: Iterable[str]) -> tuple[str, ...]:
    """The first entry of :data:`TEXT_FIELDS` whose names are all present; the last entry if there is none. A
    conversation's has :data:`TOOLS` at its end where that is present."""
    present = set(names)
    fields = next((fields for fields in TEXT_FIELDS if set(fields) <= present), TEXT_FIELDS[-1])
    return (*fields, TOOLS) if TOOLS in present and fields in _WITH_TOOLS else fields


def make_document(fields: tuple[str, ...], values: Sequence[Any]) -> str:
    """Make one document from the values of text_fields. Raises ValueError for values of another type or form."""
    text = _document(fields, values)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("has half a character (a lone surrogate) in its text") from error
    return text


def _document(fields: tuple[str, ...], values: Sequence[Any]) -> str:
    if fields[-1] == TOOLS:
        return _with_tools(_document(fields[:-1], values[:-1]), values[-1])
    if fields == ("messages",):
        return CONVERSATION + dumps(_messages(values[0]))
    if fields[:2] == rollouts.FIELDS:
        try:
            return rollouts.document(dict(zip(fields, values, strict=True)))
        except ValueError as error:
            raise ValueError(first_sentence(error)) from error
    if fields == rollouts.ROW_FIELDS:
        raise ValueError(rollouts.ONE_COMPLETION)
    if fields[-2:] == PREFERENCE:
        sides = {name: _turns(value, "assistant") for name, value in zip(PREFERENCE, values[-2:], strict=True)}
        if len(fields) > 2:
            have_prompt = {side[0]["role"] != "assistant" for side in sides.values()}
            if len(have_prompt) > 1:
                raise ValueError("needs 'chosen' and 'rejected' that are both answers, or both whole conversations")
            if have_prompt == {False}:
                sides = {name: _turns(values[0], "user") + side for name, side in sides.items()}
        return CONVERSATION + dumps(sides)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"needs an object with {EXPECTED_FIELDS}")
    return join_texts(*values)


def _turns(value: Any, role: str) -> list[Any]:
    """Messages of one side of a preference, from the text of one message with this role or a list of messages."""
    return _messages([{"role": role, "content": value}] if isinstance(value, str) else value)


def _messages(messages: Any) -> list[Any]:
    """Check a conversation, given as a list or as its JSON. Raises ValueError for another form."""
    try:
        messages = loads(messages) if isinstance(messages, str) else messages
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has messages that are not JSON ({error})") from error
    if not isinstance(messages, list) or not messages:
        raise ValueError("has messages that are not a list of objects with role and content")
    return [_message(message) for message in messages]


def _message(message: Any) -> dict[str, Any]:
    """Check a message, and join the parts of its content. Raises ValueError."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError("has a message that is not an object with a string 'role'")
    content = message.get("content")
    if isinstance(content, list):
        message = {**message, "content": "".join(map(_text_of_part, content))}
    elif not isinstance(content, (str, type(None))):
        raise ValueError("has a message whose content is not a string")
    for name, kinds, allowed in (("weight", (int, float), "0 or 1"), ("train", bool, "true or false")):
        value = message.get(name)
        if value is not None and (not isinstance(value, kinds) or value not in (0, 1)):
            raise ValueError(f"has a message with {name}={value!r}, which must be {allowed}")
        if value and message["role"] in PROMPT_ROLES:
            raise ValueError(f"has {name}={value!r} in a message of role {message['role']!r}; only answers are learnt")
    return message


def _text_of_part(part: Any) -> str:
    """The text of one part of a message's content, ``{"type": "text", "text": ...}``. Raises ValueError for others."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"has a message with a part of type {kind!r}; only parts of type 'text' can be learnt")
    return part["text"]


def _with_tools(document: str, tools: Any) -> str:
    """A document with the tools of its conversation, given as a list or as its JSON. Raises ValueError."""
    try:
        tools = loads(tools.strip() or "null") if isinstance(tools, str) else tools
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has tools that are not JSON ({error})") from error
    if not tools or not document:
        return document
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("has tools that are not a list of objects")
    if document.startswith(CONVERSATION):
        found = json.loads(document.removeprefix(CONVERSATION))
    else:
        found = turns(*document.split(PAIR))
    return CONVERSATION + dumps((found if isinstance(found, dict) else {"messages": found}) | {TOOLS: tools})


def turns(question: str, answer: str) -> list[dict[str, Any]]:
    """Messages of a question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def join_texts(*texts: str) -> str:
    """Join a text, or source and target, to one document, blank if either is. Raises ValueError for reserved marks."""
    for mark, what in ((CONVERSATION, "U+001D, which marks conversations"), (rollouts.ROLLOUTS, "U+001C, of rollouts")):
        if any(text.startswith(mark) for text in texts):
            raise ValueError(f"begins with the character {what}")
    if len(texts) > 1 and any(PAIR in text for text in texts):
        raise ValueError("has the character U+001E, which divides source and target, in one of them")
    return PAIR.join(texts) if all(text.strip() for text in texts) else ""


def check_domain(domain: str, source: str) -> None:
    """Refuse a domain's name that could not be shown in tables and plots. Raises ConfigError naming `source`."""
    try:
        _check_domain(domain)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


def _check_domain(domain: str) -> None:
    if not domain or len(domain) > MAX_DOMAIN_NAME or not domain.isprintable():
        shown = ascii(domain[: 2 * MAX_DOMAIN_NAME])
        raise ValueError(f"domain={shown}: must be a non-empty string of 1 to {MAX_DOMAIN_NAME} printable characters")


def file_documents(path: epath.Path, digest: Any) -> Iterator[tuple[int, bytes, str, str | None]]:
    """Yield (first byte, bytes, text, domain or None) of each document of a file of text or of JSON lines.

    Args:
      path: the file.
      digest: a hashlib object, updated with the bytes of the whole file.

    Raises:
      ConfigError: a record is malformed; the file and line are named.
    """
    start, line = 0, 1
    with path.open("rb") as file:
        for blob in file if path.suffix.lower() == JSON_LINES else file_sections(file):
            digest.update(blob)
            if blob.strip():
                try:
                    text, domain = parse_document(blob, path)
                except UnicodeDecodeError as error:
                    at = line + error.object[: error.start].count(b"\n")  # without the mark
                    raise ConfigError(f"{path}, line {at}: is not UTF-8 text ({error.reason})") from error
                except ValueError as error:
                    raise ConfigError(f"{path}, line {line}: {error}") from error
                if text.strip():
                    yield start, blob, text, domain
            start, line = start + len(blob), line + blob.count(b"\n")


def file_sections(file: Any) -> Iterator[bytes]:
    """Cut a binary file by the rule of :func:`sections`, reading it as a stream."""
    before = b""
    current = []
    size = 0
    while line := _line(file):
        current.append(line)
        size += len(line)
        if size >= SECTION_LIMIT or (size >= SECTION_TARGET and not line.strip()):
            if before:
                yield before
            before = b"".join(current)
            current = []
            size = 0
    tail = b"".join(current)
    if len(tail) < SECTION_TAIL:
        before, tail = before + tail, b""
    yield from (part for part in (before, tail) if part)


def _line(file: Any) -> bytes:
    """Read a line; if it is longer than SECTION_LIMIT, only that many bytes and the rest of the last character."""
    line = file.readline(SECTION_LIMIT)
    if not line.endswith(b"\n"):
        for back in range(1, min(4, len(line)) + 1):
            byte = line[-back]
            if byte >= 0xC0:  # begins a character of 2 to 4 bytes
                return line + file.read(max(0, 2 + (byte >= 0xE0) + (byte >= 0xF0) - back))
            if byte < 0x80:
                break
    return line


def parse_document(blob: bytes, path: epath.Path) -> tuple[str, str | None]:
    """Return (text, domain or None) of a document's bytes; the suffix of `path` gives the format.

    A byte order mark (U+FEFF) at the beginning, as Windows writes it, is no part of the text.

    Raises:
      ValueError: the bytes are not UTF-8, or not a JSON object with one of TEXT_FIELDS.
    """
    if path.suffix.lower() != JSON_LINES:
        return join_texts(blob.decode("utf-8-sig")), None
    try:
        record = loads(blob.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg} in column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("cannot be parsed as JSON: nested too deeply") from error
    record = record if isinstance(record, dict) else {}
    domain = record.get("domain")
    if domain is not None:
        if not isinstance(domain, str):
            raise ValueError(f"domain={domain!r}: must be a non-empty string")
        _check_domain(domain)
    names = text_fields(record)
    return make_document(names, [record.get(name) for name in names]), domain
