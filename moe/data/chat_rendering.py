"""Program that renders a chat template, which is untrusted code, in Jinja's sandbox; run by moe.data.chat.

It is a process of its own because code that the sandbox allows may still run for ever or fill the memory, such as
nested loops or ``"x" * 10 ** 10``. Its arguments are the limits. It reads lines of JSON: {"source"}, and then requests
{"date", "values": {"messages", "tools", ...}}; it writes a line for each: {"marks_answers", "reads_tools"} for the
source, {"text", "spans"} for a request, or {"error"}. It imports nothing of this package.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import json
import re
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

#: First and last (exclusive) character of an answer.
Span = tuple[int, int]

#: Limits: processor time of one rendering, bytes of the process, and characters of one rendering.
SECONDS = 10.0
MEMORY = 1 << 30
CHARACTERS = 1 << 26
#: Characters to mark the ends of an answer with: Unicode's noncharacters, which texts should not have.
_MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


class _Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``, which marks what a model writes."""

    tags: set[str] = {"generation"}  # noqa: RUF012  # as the base class has it

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        environment.extend(marks=self.marks, marks_answers=False)
        self._marks = contextvars.ContextVar[tuple[str, str]]("marks", default=("", ""))

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        self.environment.marks_answers = True  # pyright: ignore[reportAttributeAccessIssue]
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        begin, end = self._marks.get()
        return f"{begin}{caller()}{end}"

    @contextlib.contextmanager
    def marks(self, begin: str, end: str) -> Iterator[None]:
        """Put these characters around the text of every block."""
        token = self._marks.set((begin, end))
        try:
            yield
        finally:
            self._marks.reset(token)


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
    """The text of a conversation, and the spans that the template marks as written by the model.

    A second rendering has a character at the beginning and end of every marked block. The spans are therefore right
    wherever the blocks stand: macros, ``set``, ``filter`` and ``call`` put text into the output later than they run.

    Args:
        template: of :func:`make_environment`.
        values: what the template reads.

    Raises:
        ValueError: the text is too long, or the characters change what the template writes.
    """
    environment: Any = template.environment
    text = _generate(template, values)
    if not environment.marks_answers:
        return text, []
    unused = [mark for mark in _MARKS if mark not in text]
    if len(unused) < 2:
        raise ValueError("its text has nearly all of the characters U+FDD0 to U+FDEF, with which answers are marked")
    begin, end = unused[:2]
    with environment.marks(begin, end):
        with_marks = _generate(template, values)
    spans = _spans(with_marks, begin, end)
    if spans is None or with_marks.replace(begin, "").replace(end, "") != text:
        raise ValueError(
            "it changes the text of a {% generation %} block, such as by a filter, so that its answers cannot be found"
        )
    return text, spans


def _generate(template: jinja2.Template, values: dict[str, Any]) -> str:
    blocks: list[str] = []
    size = 0
    for block in template.generate(**values):
        blocks.append(block)
        size += len(block)
        if size > CHARACTERS:
            raise ValueError(f"its text has more than {CHARACTERS:,} characters")
    return "".join(blocks)


def _spans(text: str, begin: str, end: str) -> list[Span] | None:
    """Spans between the marks of a text, counted without the marks; None for a mark without its counterpart."""
    spans: list[Span] = []
    starts: list[int] = []
    for number, mark in enumerate(re.finditer(f"[{begin}{end}]", text)):
        place = mark.start() - number
        if mark[0] == begin:
            starts.append(place)
        elif not starts:
            return None
        else:
            spans.append((starts.pop(), place))
    return None if starts else spans


def answer(line: str, template: jinja2.Template | None) -> tuple[dict[str, Any], jinja2.Template | None]:
    """The answer to a line, and the template that the next line is for."""
    request = json.loads(line)
    try:
        if template is None:
            environment: Any = make_environment()
            template = environment.from_string(request["source"])
            names = jinja2.meta.find_undeclared_variables(environment.parse(request["source"]))
            return {"marks_answers": environment.marks_answers, "reads_tools": "tools" in names}, template
        date = datetime.datetime.fromisoformat(request["date"]) if request["date"] else datetime.datetime.now()
        values = request["values"] | {"strftime_now": lambda pattern: date.strftime(pattern)}
        text, spans = render(template, values)
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
