"""Program that renders a chat template, which is untrusted code, in Jinja's sandbox; run by moe.data.chat.

It is a process of its own because code that the sandbox allows may still run for ever or fill the memory, such as
nested loops or ``"x" * 10 ** 10``. Its arguments are the limits. It reads lines of JSON: {"source"}, and then requests
{"date", "values": {"messages", "add_generation_prompt", ...}}; it writes a line for each: {"text", "spans"} or
{"error"}. It imports nothing of this package.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import json
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

#: First and last (exclusive) character of an answer.
Span = tuple[int, int]

#: Limits: processor time of one rendering, bytes of the process, and characters of one rendering.
SECONDS, MEMORY, CHARACTERS = 10.0, 1 << 30, 1 << 26


class _Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``, which marks what a model writes."""

    tags: set[str] = {"generation"}  # noqa: RUF012  # as the base class has it

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        environment.extend(record_spans=self.record)
        self._recorded = contextvars.ContextVar[tuple[list[str], list[Span]] | None]("recorded", default=None)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        text = caller()
        if (recorded := self._recorded.get()) is not None:
            blocks, spans = recorded
            start = sum(map(len, blocks))
            spans.append((start, start + len(text)))
        return text

    @contextlib.contextmanager
    def record(self, blocks: list[str], spans: list[Span]) -> Iterator[None]:
        """Record the spans of a rendering whose blocks so far are in ``blocks``."""
        token = self._recorded.set((blocks, spans))
        try:
            yield
        finally:
            self._recorded.reset(token)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any):  # pyright: ignore[reportSelfClsParameterName]
        self, *rest = args
        names = dict(*rest, **values)
        for name in names:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template cannot set {name!r}")


class _Dict:
    """``dict`` as a template sees it: a call, and fromkeys."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Serialise as JSON; unlike Jinja's own filter, do not escape the characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment() -> jinja2.sandbox.SandboxedEnvironment:
    """Sandbox with the filters and globals that a template can use."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def render(template: jinja2.Template, values: dict[str, Any]) -> tuple[str, list[Span]]:
    """The text of a conversation, and the spans that the template marks as written by the model."""
    blocks: list[str] = []
    spans: list[Span] = []
    size = 0
    with template.environment.record_spans(blocks, spans):  # pyright: ignore[reportAttributeAccessIssue]
        for block in template.generate(**values):
            blocks.append(block)  # spans count from the end of the blocks so far
            size += len(block)
            if size > CHARACTERS:
                raise ValueError(f"its text has more than {CHARACTERS:,} characters")
    return "".join(blocks), spans


def answer(line: str, template: jinja2.Template | None) -> tuple[dict[str, Any], jinja2.Template | None]:
    """The answer to a line, and the template that the next line is for."""
    request = json.loads(line)
    try:
        if template is None:
            return {}, make_environment().from_string(request["source"])
        date = datetime.datetime.fromisoformat(request["date"]) if request["date"] else datetime.datetime.now()
        text, spans = render(template, request["values"] | {"strftime_now": lambda pattern: date.strftime(pattern)})
    except Exception as error:  # a template is a program and may raise anything
        kind = "" if template is None else f"{type(error).__name__}: "
        return {"error": " ".join(f"{kind}{error}".split())[:300]}, template
    return {"text": text, "spans": spans}, template


def main() -> None:
    """Answer until the end of the input."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the parent, with which this process ends
        signal.signal(number, signal.SIG_IGN)
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    template = None
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
        reply, template = answer(line, template)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
