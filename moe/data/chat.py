"""Conversations: the chat template of a tokenizer, and token ids with the loss only on the answers.

A template is a Jinja program that comes with a checkpoint. It is data: it runs in Jinja's immutable sandbox, in a
process of bounded time and memory (:mod:`moe.data.chat_rendering`), sees only the messages and the names of special
tokens, and has the helpers that the transformers library gives it.

As in that library, the rendered text is tokenised as a whole, special tokens included: ``</s>`` typed in a message
becomes the same id as one that the template wrote.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe.config import ConfigError
from moe.data import chat_rendering
from moe.data.chat_rendering import Span
from moe.data.documents import CONVERSATION, PAIR, PROMPT_ROLES, TOOLS, turns
from moe.data.json_tokenizer import JsonTokenizer
from moe.data.tokenizer import Tokenizer

#: Messages as dicts with "role", "content" and whatever else a template reads.
Messages = Sequence[dict[str, Any]]
#: Descriptions of functions as templates read them, such as {"type": "function", "function": {...}}.
Tools = Sequence[dict[str, Any]] | None
#: What templates that ask for the date get in training and evaluation, so that rows do not depend on the day or the
#: host; the default of Llama 3's template.
DATE = "2024-07-26"
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field; templates read the first


# --- Templates -------------------------------------------------------------------------------------------------------
class ChatTemplate:
    """A compiled chat template with the special tokens that it can name, in a process of its own."""

    def __init__(self, source: str, special_tokens: dict[str, str], name: str):
        """
        Args:
            source: the template.
            special_tokens: bos_token, eos_token, ...
            name: where it comes from, for messages.

        Raises:
            ConfigError: it cannot be compiled.
        """
        self._source = source
        self._special_tokens = special_tokens
        self._name = name
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        #: Whether the template itself marks what the model writes, and whether it reads the tools.
        self.marks_answers = False
        self._reads_tools = False
        with self._lock:
            self._start()

    def render(
        self, messages: Messages, tools: Tools = None, *, add_generation_prompt: bool = False, date: str = DATE
    ) -> tuple[str, list[Span]]:
        """The text of a conversation, and the spans that the template marks as written by the model.

        Args:
            messages: of the conversation.
            tools: that its answers may call.
            add_generation_prompt: end with the beginning of an answer.
            date: YYYY-MM-DD, or "" for today's.

        Raises:
            ConfigError: the template does not read the tools that there are, refuses the messages, does what the
                sandbox forbids, or takes too much time or memory (:mod:`moe.data.chat_rendering`).
        """
        if tools and not self._reads_tools:
            raise ConfigError(f"{self._name}: a conversation has tools, which the chat template does not read")
        values = {
            "messages": [_plain_message(message) for message in messages],
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        with self._lock:
            if self._process is None:
                self._start()
            reply = self._ask({"date": date, "values": values | self._special_tokens})
        if "error" in reply:
            raise ConfigError(f"{self._name}: the chat template refuses a conversation ({reply['error']})")
        return reply["text"], [(start, end) for start, end in reply["spans"]]

    def _start(self) -> None:
        limits = str(chat_rendering.SECONDS), str(chat_rendering.MEMORY)
        command = [sys.executable, "-I", chat_rendering.__file__, *limits]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, **pipes, encoding="ascii")
        self._end = weakref.finalize(self, _end, self._process)
        reply = self._ask({"source": self._source})
        if "error" in reply:
            self._stop()
            raise ConfigError(f"{self._name}: the chat template cannot be compiled ({reply['error']})")
        self.marks_answers = reply["marks_answers"]
        self._reads_tools = reply["reads_tools"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request to the process, as one line, and return its answer, the next line that it writes."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:  # an answer that comes later would be taken for that of the next request
            process.kill()
            self._stop()
            raise
        if line.endswith("\n"):
            return json.loads(line)
        self._stop()
        if process.returncode == -signal.SIGPROF:
            return {"error": f"it takes more than {chat_rendering.SECONDS:g} s of processor time"}
        if process.returncode == -signal.SIGKILL:
            return {"error": "its process was killed"}
        return {"error": f"it needs more than {chat_rendering.MEMORY >> 20} MiB"}

    def _stop(self) -> None:
        self._process = None
        self._end()


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(BrokenPipeError):
        process.communicate()


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message without fields that are null, and with its reasoning under every name that templates read."""
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


@functools.lru_cache(maxsize=4)  # each is a process, which ends when nothing refers to it any more
def _compiled(source: str, special_tokens: tuple[tuple[str, str], ...], name: str) -> ChatTemplate:
    return ChatTemplate(source, dict(special_tokens), name)


def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a tokenizer.

    Raises:
        ConfigError: it has none, or is no tokenizer.json.
    """
    if not isinstance(tokenizer, JsonTokenizer):
        raise ConfigError(
            "conversations: they need a tokenizer.json with a chat template, as imports of chat models have; set "
            "data.tokenizer to one, or start from such an import (start.checkpoint)"
        )
    if tokenizer.chat_template is None:
        raise ConfigError(
            "conversations: the tokenizer has no chat template (chat_template in tokenizer_config.json, or "
            "chat_template.jinja); set data.chat_template to a file with one"
        )
    return _compiled(tokenizer.chat_template, tuple(tokenizer.special_tokens.items()), tokenizer.source)


# --- Answers ---------------------------------------------------------------------------------------------------------
def rendered_answers(template: ChatTemplate, messages: Messages, tools: Tools = None) -> list[tuple[str, list[Span]]]:
    """Texts of a conversation with the spans of the answers to learn.

    A template with ``{% generation %}`` marks the spans. With other templates an answer is what the text up to and
    including it adds to the text before it with the generation prompt: its content and the end of its turn. Where a
    template renders an answer differently once more turns follow, for example without its reasoning, that answer is
    learnt from a separate text that ends with it. An answer that begins a conversation is not learnt, nor is one with
    ``"weight": 0`` or ``"train": false``.

    Raises:
        ConfigError: see :meth:`ChatTemplate.render`; or an answer that is not to be learnt cannot be told from others.
    """
    whole, spans = template.render(messages, tools)
    if template.marks_answers:
        return [(whole, _without_unwanted(template, messages, tools, whole, spans))]
    apart = []
    for i, message in enumerate(messages):
        if message.get("role") != "assistant" or i == 0 or _is_unwanted(message):
            continue
        until, span = _turn(template, messages, tools, i)
        if whole.startswith(until):
            spans.append(span)
        else:
            apart.append((until, [span]))
    return [*apart, (whole, spans)] if spans else apart


def _turn(template: ChatTemplate, messages: Messages, tools: Tools, number: int) -> tuple[str, Span]:
    """The text that ends with a message, and the message's span in it without the generation prompt."""
    until, _ = template.render(messages[: number + 1], tools)
    before = template.render(messages[:number], tools, add_generation_prompt=True)[0] if number else ""
    # A prompt for reasoning, such as "<think>", may not be part of an answer that has none.
    return until, (_common_prefix(before, until), len(until))


def _is_unwanted(message: dict[str, Any]) -> bool:
    """Whether a message is marked as not to be learnt: OpenAI's ``weight``, or Axolotl's ``train``."""
    return message.get("weight") == 0 or message.get("train") is False


def _without_unwanted(
    template: ChatTemplate, messages: Messages, tools: Tools, whole: str, spans: list[Span]
) -> list[Span]:
    """The spans that a template marks, without those of unwanted answers. Raises ConfigError."""
    for i, message in enumerate(messages):
        if message["role"] in PROMPT_ROLES or not _is_unwanted(message):
            continue
        until, (start, end) = _turn(template, messages, tools, i)
        if not whole.startswith(until):
            raise ConfigError(
                f"a conversation has an answer with weight 0 or train false (message {i}), which the chat template "
                "renders differently once more turns follow, so that it cannot be left out; remove the mark"
            )
        spans = [(first, last) for first, last in spans if last <= start or first >= end]
    return spans


def _common_prefix(first: str, second: str) -> int:
    """Number of characters with which both texts begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def encode_answers(tokenizer: JsonTokenizer, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Ids [n] int32 of a text, and mask [n] bool, True for tokens that overlap a span."""
    ids, offsets = tokenizer.encode_rendered(text)
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(ids), bool)
    for first, last in spans:
        mask |= (ends > first) & (starts < last)
    return ids, mask


# --- Documents -------------------------------------------------------------------------------------------------------
def read_conversation(text: str, dataset: str) -> tuple[list[dict[str, Any]], Tools]:
    """Messages and tools of a document (:mod:`moe.data.documents`): a conversation, the chosen one of a pair, or a
    source as the question and its target as the answer.

    Raises:
        ConfigError: the document is a plain text.
    """
    if text.startswith(CONVERSATION):
        found = json.loads(text.removeprefix(CONVERSATION))
        if isinstance(found, list):
            return found, None
        return found["chosen"] if "chosen" in found else found["messages"], found.get(TOOLS)
    source, divided, target = text.partition(PAIR)
    if not divided:
        raise ConfigError(
            f"data.objective='chat': needs documents with messages, prompt and response, or source and target, and "
            f"{dataset!r} has texts; docs/finetuning.md shows the formats"
        )
    return turns(source, target), None


def encoded_answers(messages: Messages, tokenizer: Tokenizer, tools: Tools = None) -> list[dict[str, np.ndarray]]:
    """``tokens`` and ``targets`` [n] of the texts of a conversation (:func:`rendered_answers`), the whole one last.

    Raises:
        ConfigError: see :func:`chat_template` and :func:`rendered_answers`.
    """
    template = chat_template(tokenizer)
    assert isinstance(tokenizer, JsonTokenizer)
    found = []
    for rendered, spans in rendered_answers(template, messages, tools):
        ids, mask = encode_answers(tokenizer, rendered, spans)
        found.append({"tokens": ids[:-1], "targets": np.where(mask[1:], ids[1:], -1).astype(np.int32)})
    return found


def prompt_ids(tokenizer: Tokenizer, messages: Messages, tools: Tools = None, date: str = DATE) -> np.ndarray:
    """Ids [n] int32 of a conversation and the generation prompt of the next answer; date as in
    :meth:`ChatTemplate.render`."""
    template = chat_template(tokenizer)
    assert isinstance(tokenizer, JsonTokenizer)
    return tokenizer.encode_rendered(template.render(messages, tools, add_generation_prompt=True, date=date)[0])[0]


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The first special token that the template writes after an answer, if any, and the end-of-text token."""
    template = chat_template(tokenizer)
    assert isinstance(tokenizer, JsonTokenizer)
    answered = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    text, spans = rendered_answers(template, answered)[-1]
    ends = [(start, end) for start, end in spans] or [(0, len(text))]
    after = text[max(ends)[0] :].partition("x")[2]
    special = [int(i) for i in tokenizer.encode_rendered(after)[0] if int(i) in tokenizer.special_ids]
    return tuple(dict.fromkeys([*special[:1], tokenizer.eos_id]))
