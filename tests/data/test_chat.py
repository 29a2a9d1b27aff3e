"""Conversations: ids and masks of the transformers library, rows, refusals, and what a template may not do."""

import dataclasses
import datetime
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath

from moe.config import ConfigError, DataConfig, to_dict
from moe.data import chat, chat_rendering, columns, documents, pipeline
from moe.data.json_tokenizer import JsonTokenizer
from moe.objectives import preferences
from moe.objectives.chat import Chat, examples
from moe.parallel.mesh import make_mesh
from moe.training import open_workdir
from moe.training.step import build
from tests.run_helpers import tiny, write_run

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parents[1] / "data" / "chat"
EXPECTED = json.loads((HERE / "expected.json").read_text())
NAMES = ("chatml", "llama3", "mistral")


def tokenizer(name="chatml", **changes):
    settings = EXPECTED[name]["tokenizer_config"] | changes
    return JsonTokenizer((HERE / "tokenizer.json").read_bytes(), json.dumps(settings).encode())


def conversation(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize("name", NAMES)
def test_ids_masks_and_prompts_equal_those_of_transformers(name):
    """ChatML with {% generation %}; Llama 3 and Mistral without. A typed </s> is the special token in both."""
    tokens = tokenizer(name)
    for row in EXPECTED[name]["rows"]:
        ((text, spans),) = chat.rendered_answers(chat.chat_template(tokens), row["messages"])
        ids, mask = chat.encode_answers(tokens, text, spans)
        assert ids.tolist() == row["ids"]
        assert mask.astype(int).tolist() == row["mask"]
        beginning = row["messages"][: 2 if row["messages"][0]["role"] == "system" else 1]
        assert chat.prompt_ids(tokens, beginning).tolist() == row["prompt"]


def test_a_row_by_hand():
    """Tokens <s> [INST] a [/INST] b </s>: the answer "b" and its end are targets, each at the token before it."""
    tokens = tokenizer("mistral", chat_template="{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")  # fmt: skip
    ids = {text: tokens.piece_id(text) for text in ("<s>", "[INST]", "a", "[/INST]", "b", "</s>")}
    pair = documents.join_texts("a", "b")
    (example,) = examples(pair, 16, tokens, "texts")
    assert example["tokens"].tolist() == [ids[text] for text in ("<s>", "[INST]", "a", "[/INST]", "b")]
    assert example["targets"].tolist() == [-1, -1, -1, ids["b"], ids["</s>"]]
    assert chat.stop_ids(tokens) == (ids["</s>"],)
    # Cut after four tokens, the end of the answer is lost; after three, all of it.
    (cut,) = examples(pair, 4, tokens, "texts")
    assert cut["targets"].tolist() == [-1, -1, -1, ids["b"]]
    assert examples(pair, 3, tokens, "texts") == []
    packed = {
        "tokens": np.asarray([5, 6, 7, 0]),
        "targets": np.asarray([-1, 7, 9, 0]),
        "tokens_segment_ids": np.asarray([1, 1, 2, 0]),
        "tokens_positions": np.asarray([0, 1, 0, 0]),
    }
    row = Chat().row(packed, pad_id=1)
    assert row["tokens"].tolist() == [5, 6, 7, 1]
    assert row["targets"].tolist() == [-1, 7, 9, -1]
    assert (row["segment_ids"].tolist(), row["positions"].tolist()) == ([1, 1, 2, 0], [0, 1, 0, 0])


def test_an_answer_that_later_turns_render_differently_is_learnt_from_a_separate_text():
    """A template that keeps only the last answer's reasoning, as Qwen3's does; its prompt opens the reasoning."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
        "<think>\n{{ m.reasoning_content | default('') }}</think>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    messages = conversation("q", "first", "r", "second")
    messages[1]["reasoning"] = "because"  # an alias of reasoning_content
    texts = chat.rendered_answers(chat.ChatTemplate(template, {}, "t"), messages)
    learnt = [text[start:end] for text, spans in texts for start, end in spans]
    assert learnt == ["because</think>\nfirst<|im_end|>\n", "</think>\nsecond<|im_end|>\n"]
    assert texts[0][0].startswith("<|im_start|>user\nq")
    # A first turn by the assistant answers nothing and is not learnt.
    greeting = chat.rendered_answers(
        chat.ChatTemplate(template, {}, "t"), conversation("hello", "q", "a", first="assistant")
    )
    assert [text[start:end] for text, spans in greeting for start, end in spans] == ["</think>\na<|im_end|>\n"]


_MARKED = "{% generation %}{{ m.content }}E{% endgeneration %}"
_TURNS = (
    "{%% for m in messages %%}<{{ m.role }}>{%% if m.role == 'assistant' %%}%s"
    "{%% else %%}{{ m.content }}{%% endif %%}{%% endfor %%}"
)


@pytest.mark.parametrize(
    "answer",
    [
        _MARKED,
        "{% macro one(m) %}turn:" + _MARKED + "{% endmacro %}{{ one(m) }}",
        "{% set text %}turn:" + _MARKED + "{% endset %}later {{ text }}",
        "{% filter upper %}turn:" + _MARKED + "{% endfilter %}",
        "{% macro wrap() %}turn:{{ caller() }}{% endmacro %}{% call wrap() %}x" + _MARKED + "{% endcall %}",
        "{% for x in [m, {}] recursive %}{% if x %}a{{ loop([{}]) }}" + _MARKED + "{% endif %}{% endfor %}",
    ],
    ids=["plain", "macro", "set", "filter", "call", "loop"],
)
def test_marked_answers_are_found_wherever_the_block_stands(answer):
    """Each answer and its end, and nothing else, also where text reaches the output after the block has run."""
    text, spans = chat.ChatTemplate(_TURNS % answer, {}, "t").render(conversation("Q", "B", "R", "D"))
    assert [text[start:end] for start, end in spans] == ["BE", "DE"]


@pytest.mark.parametrize(
    ("answer", "learnt"),
    [
        ("{% set text %}" + _MARKED + "{% endset %}", []),  # never written
        ("{% set text %}" + _MARKED + "{% endset %}{{ text }}{{ text }}", ["BE", "BE"]),  # written twice
        ("{# " + _MARKED + " #}{{ m.content }}", None),  # a comment: the template marks nothing
    ],
)
def test_marked_answers_are_those_that_are_written(answer, learnt):
    template = chat.ChatTemplate(_TURNS % answer, {}, "t")
    text, spans = template.render(conversation("Q", "B"))
    assert template.marks_answers == (learnt is not None)
    assert [text[start:end] for start, end in spans] == (learnt or [])


TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"default": None}}},
}
_WITH_TOOLS = (
    "{% if not tools is defined %}{% set tools = none %}{% endif %}{% if tools %}[{{ tools | tojson }}]{% endif %}"
)
_PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}E{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def record(fields):
    """The document of a line with these fields."""
    return documents.parse_document(json.dumps(fields).encode(), epath.Path("a.jsonl"))[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": conversation("Q", "A"), "tools": [TOOL]},
        {"messages": json.dumps(conversation("Q", "A")), "tools": json.dumps([TOOL])},
        {"prompt": "Q", "response": "A", "tools": [TOOL]},
        {"source": "Q", "target": "A", "tools": [TOOL]},
        {"prompt": "Q", "chosen": "A", "rejected": "B", "tools": [TOOL]},
    ],
)
def test_the_tools_of_a_conversation_reach_the_template(fields):
    """They were dropped: the model learnt calls of tools that it did not see. A null in them stays."""
    messages, tools = chat.read_conversation(record(fields), "t")
    template = chat.ChatTemplate(_WITH_TOOLS + _PLAIN, {}, "t")
    ((text, spans),) = chat.rendered_answers(template, messages, tools)
    assert text == f"[[{json.dumps(TOOL)}]]<user>QE<assistant>AE"
    assert [text[start:end] for start, end in spans] == ["AE"]
    with pytest.raises(ConfigError, match="t: a conversation has tools, which the chat template does not read"):
        chat.rendered_answers(chat.ChatTemplate(_PLAIN, {}, "t"), messages, tools)
    for none in ([], None, "", " ", "[]", "null"):
        assert record(fields | {"tools": none}) == record({k: v for k, v in fields.items() if k != "tools"})


def test_a_pairs_tools_are_in_both_of_its_conversations():
    fields = {"prompt": "Q", "chosen": "good", "rejected": "bad", "tools": [TOOL]}
    templates = {with_tools: tokenizer(chat_template=with_tools + _PLAIN) for with_tools in ("", _WITH_TOOLS)}
    (example,) = preferences.example(record(fields), 4096, templates[_WITH_TOOLS], "t")
    (without,) = preferences.example(record(fields | {"tools": []}), 4096, templates[""], "t")
    added = len(example["tokens"]) - len(without["tokens"])
    description = templates[""].encode_rendered(f"[[{json.dumps(TOOL)}]]<")[0]
    assert added == 2 * (len(description) - len(templates[""].encode_rendered("<")[0]))


def test_tools_of_a_table_are_json(tmp_path):
    """Tools that are structures would each have the fields of all; a row may have none."""
    path = epath.Path(tmp_path / "a.parquet")
    rows = {"messages": [conversation("Q", "A")] * 3, "tools": [json.dumps([TOOL]), None, "[]"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    columns.copy_columns(path, tmp_path / "a.arrow")
    texts = [text for _, text, _ in columns.TextTable(tmp_path / "a.arrow").rows("a")]
    assert [chat.read_conversation(text, "t")[1] for text in texts] == [[TOOL], None, None]
    pyarrow.parquet.write_table(pyarrow.table(rows | {"tools": [[TOOL]] * 3}), path)
    with pytest.raises(ConfigError, match="column 'tools' must be of strings of JSON, not list<"):
        columns.copy_columns(path, tmp_path / "b.arrow")


def test_parts_of_a_messages_content_are_joined():
    """Under ChatML they were learnt as Python's text of a list."""
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image": None}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1]}]
    assert record({"messages": messages}) == record({"messages": conversation("a b", "a ")})


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}])
@pytest.mark.parametrize("answer", [_MARKED, "{{ m.content }}E"], ids=["marked", "unmarked"])
def test_an_answer_that_is_not_to_be_learnt_is_part_of_the_prompt(mark, answer):
    messages = conversation("Q", "B", "R", "D")
    messages[1] |= mark
    messages[3] |= {"weight": 1, "train": True}
    template = chat.ChatTemplate(_TURNS % answer + "{% if add_generation_prompt %}<assistant>{% endif %}", {}, "t")
    ((text, spans),) = chat.rendered_answers(template, messages)
    assert text == "<user>Q<assistant>BE<user>R<assistant>DE"
    assert [text[start:end] for start, end in spans] == ["DE"]
    messages[3] |= mark | {"train": False}
    assert not any(spans for _, spans in chat.rendered_answers(template, messages))


def test_an_unwanted_answer_that_cannot_be_found_is_refused():
    changing = (
        "{% for m in messages %}{% generation %}{{ m.content if loop.last else '-' }}{% endgeneration %}{% endfor %}"
    )
    messages = conversation("Q", "B", "R", "D")
    messages[1]["weight"] = 0
    with pytest.raises(
        ConfigError, match=r"an answer with weight 0 or train false \(message 1\), which the chat template"
    ):
        chat.rendered_answers(chat.ChatTemplate(changing, {}, "t"), messages)


@pytest.mark.parametrize("filtered", ["text | trim", "text | reverse", "text | length", "text | truncate(5, true)"])
def test_a_template_that_changes_a_marked_answer_is_refused(filtered):
    answer = "{% set text %}{% generation %} {{ m.content }} {% endgeneration %}{% endset %}{{ " + filtered + " }}"
    with pytest.raises(ConfigError, match=r"it changes the text of a \{% generation %\} block"):
        chat.ChatTemplate(_TURNS % answer, {}, "t").render(conversation("Q", "B" * 9))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system') }}", r"refuses a conversation \(TemplateError: no system\)"),
        ("{{ messages.append(1) }}", "refuses a conversation .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "refuses a conversation .*unsafe"),
        ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "refuses a conversation .*__init__"),
        ("{{ messages[0].content + 1 }}", "refuses a conversation .*TypeError"),
        ("{% if %}", "cannot be compiled"),
        ("{% include '/etc/passwd' %}", "refuses a conversation"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 0.5 s"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "Memory|more"),
        ("{{ '%9999999999d' % messages|length }}", "refuses a conversation .MemoryError"),
        ("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "more than"),
        ("{{ " + "(" * 9999 + "1", "cannot be compiled"),
    ],
)
def test_unsafe_or_failing_templates_are_refused_in_one_sentence(monkeypatch, template, message):
    monkeypatch.setattr(chat_rendering, "SECONDS", 0.5)
    with pytest.raises(ConfigError, match=message):
        chat.ChatTemplate(template, {}, "t").render(conversation("x"))


def test_a_template_still_works_after_a_conversation_that_exceeded_the_limit(monkeypatch):
    monkeypatch.setattr(chat_rendering, "SECONDS", 0.5)
    loops = "{% for i in range(messages[0].content|int) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = chat.ChatTemplate(loops + "\u00e9{{ messages[0].content }}", {}, "t")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"refuses a conversation \(it takes more than"):
            template.render(conversation("99999"))
        assert template.render(conversation("0\ud800"))[0] == "\u00e90\ud800"


def test_templates_have_the_helpers_of_transformers():
    template = (
        "{{ strftime_now('%Y')|length }}{{ {'b': '<é>', 'a': 1}|tojson }}{% for i in [1, 2] %}{% break %}{% endfor %}"
    )
    text, _ = chat.ChatTemplate(template, {}, "t").render(conversation("x"))
    assert text == '4{"b": "<é>", "a": 1}'


def test_a_template_whose_process_was_killed_says_so_and_works_again():
    template = chat.ChatTemplate("{{ messages[0].content }}", {}, "t")
    template._process.kill()
    with pytest.raises(ConfigError, match=r"^t: the chat template refuses a conversation \(its process was killed\)$"):
        template.render(conversation("x"))
    assert template.render(conversation("x"))[0] == "x"


def test_few_templates_have_a_process_at_a_time():
    """A notebook that reads many chat models would keep one of each."""
    processes = [
        chat.chat_template(tokenizer(chat_template=f"{number}{{{{ messages[0].content }}}}"))._process
        for number in range(6)
    ]
    assert [process.returncode for process in processes[:2]] == [0, 0]  # ended, and waited for
    assert processes[-1].poll() is None


def test_rows_do_not_depend_on_the_day():
    template = chat.ChatTemplate("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}", {}, "t")
    assert template.render(conversation("x"))[0] == "26 Jul 2024"
    assert datetime.datetime.strptime(template.render(conversation("x"), date="")[0], "%d %b %Y").year > 2024


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, "not a list of objects"),
        ({"messages": "[1"}, "messages that are not JSON"),
        ({"messages": "[" * 9**5}, "messages that are not JSON"),
        ({"messages": '[{"role": "user", "content": "a", "content": "b"}]'}, "two values of 'content'"),
        ({"messages": [{"content": "x"}]}, "an object with a string 'role'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is not a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "a part of type 'image'; only parts of type",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "a part of type 'str'"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, "weight=0.5, which must be 0 or 1"),
        (
            {"messages": [{"role": "assistant", "content": "x", "train": "no"}]},
            "train='no', which must be true or false",
        ),
        ({"messages": [{"role": "user", "content": "x", "train": True}]}, "of role 'user'; only answers are learnt"),
        ({"messages": conversation("x", "y"), "tools": {"a": 1}}, "tools that are not a list of objects"),
        ({"messages": conversation("x", "y"), "tools": "[1"}, "tools that are not JSON"),
        ({"messages": conversation("x", "y"), "tools": [1]}, "tools that are not a list of objects"),
        ({"prompt": "x"}, "needs an object with .* 'prompt' and 'response'"),
        ({"text": "\x1d[]"}, r"U\+001D"),
    ],
)
def test_a_broken_conversation_is_named(tmp_path, record, message):
    path = epath.Path(tmp_path) / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(ConfigError, match=rf"a\.jsonl, line 1: .*{message}"):
        list(documents.file_documents(path, hashlib.sha256()))


@pytest.fixture
def config(tmp_path):
    """Conversations as JSON lines and as Parquet, pairs as prompt and response; a tokenizer with Llama 3's template."""
    (tmp_path / "text" / "lines").mkdir(parents=True)
    rng = np.random.default_rng(0)
    chats = [conversation(*(f"{i} " + "ab " * n for n in rng.integers(1, 9, 4))) for i in range(200)]
    lines = [{"messages": messages} if i % 2 else {"prompt": f"p{i}", "response": "r " * (i % 7)} for i, messages in
             enumerate(chats)]  # fmt: skip
    (tmp_path / "text" / "lines" / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "text" / "table").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"messages": chats}), tmp_path / "text" / "table" / "a.parquet")
    (tmp_path / "tokenizer.json").write_bytes((HERE / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(EXPECTED["llama3"]["tokenizer_config"]))
    return DataConfig(
        dataset=str(tmp_path / "text"), directory=str(tmp_path / "cache"), tokenizer=str(tmp_path / "tokenizer.json"),
        objective="chat", sequence_length=192, shuffle_window=4, heldout_rows=4,
    )  # fmt: skip


def test_conversations_of_a_folder_are_packed_whole_and_resumed_exactly(config):
    prepared = pipeline.prepare(config, 400, progress=lambda _: None)
    assert prepared.domains == ("lines", "table")
    iterator = pipeline.train_iterator(prepared, config, batch_size=4, seed=0)
    batches = [next(iterator) for _ in range(3)]
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(3)]
    again = pipeline.train_iterator(prepared, config, batch_size=4, seed=0)
    again.set_state(state)
    for batch in expected:
        for name, values in next(again).items():
            np.testing.assert_array_equal(values, batch[name])
    bos, answer = prepared.tokenizer.bos_id, prepared.tokenizer.piece_id("<|eot_id|>")
    for batch in batches:
        starts = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
        assert (batch["tokens"][starts] == bos).all()  # each segment is a whole conversation
        assert batch["segment_ids"].max() > 1
        assert ((batch["targets"] == -1) | (batch["segment_ids"] > 0)).all()
        assert (batch["targets"] == answer).sum() >= 1
        same = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
        next_token = np.where(batch["targets"][:, :-1] >= 0, batch["targets"][:, :-1], batch["tokens"][:, 1:])
        assert (next_token[same] == batch["tokens"][:, 1:][same]).all()
    assert pipeline.unigram_nll(prepared, config) > 0
    texts = [prepared.heldout[domain][0] for domain in prepared.domains]
    assert all(len(Chat().prompt(text, config, prepared.tokenizer)) for text in texts)


def test_a_start_says_how_much_there_is_to_learn_and_what_is_left_out(config, tmp_path):
    """Two conversations to train on, one of them twice, and one each whose answers nobody learns.

    The template writes "<role>", the content and "E": 3 letters and the role's name and content, each a token but the
    tokenizer's own words. A conversation "x" → "y" has the answer "yE".
    """
    (tmp_path / "own.jinja").write_text(_PLAIN)
    folder = tmp_path / "four"
    folder.mkdir()
    chats = [conversation("x", "y"), conversation("x", "y"), conversation("x", "y", "z", "y")]
    unlearnt = [[{"role": "user", "content": "x"}, {"role": "gpt", "content": "y"}], conversation("x", "w")]
    unlearnt[1][1]["train"] = False
    train, held = (epath.Path(folder / f"{split}-00000-of-00001.parquet") for split in ("train", "test"))
    for path, rows in ((train, [*chats, *unlearnt]), (held, chats[:1])):
        pyarrow.parquet.write_table(pyarrow.table({"messages": [json.dumps(row) for row in rows]}), path)
    for name in ("a.jsonl.gz", "b.jsonl.gz", "\x1b[31m\nc.csv", "LICENSE"):
        (folder / name).write_text("x")
    changes = {"dataset": str(folder), "chat_template": str(tmp_path / "own.jinja")}
    config = dataclasses.replace(config, **changes)
    prepared = pipeline.prepare(config, 400, progress=lambda _: None)

    def tokens(text):
        return len(prepared.tokenizer.encode_rendered(text)[0]) - 1  # the first token is no target

    short, long = tokens("<user>xE<assistant>yE"), tokens("<user>xE<assistant>yE<user>zE<assistant>yE")
    answer = tokens("<user>xE<assistant>yE") - tokens("<user>xE<assistant>")
    assert list(pipeline.describe_sizes(prepared, config)) == [
        f"data: 5 conversations (4 different), {2 * short + long} tokens, {4 * answer} of them with a loss; "
        f"held out: 1 conversations (1 different), {short} tokens, {answer} of them with a loss",
        "left out: 2 of 5 conversations have no example with an answer of the role assistant within "
        f"data.sequence_length=192 tokens, such as {prepared.train['four'].where(4)}",
        f"left out of {folder}, since their suffixes are not read: 1 .csv (\\x1b[31m\\nc.csv), "
        "2 .jsonl.gz (a.jsonl.gz), 1 without a suffix (LICENSE)",
    ]


def test_a_conversation_that_the_template_refuses_is_named_at_the_start(config, tmp_path):
    prepared = pipeline.prepare(config, 400, progress=lambda _: None)
    refusing = prepared.tokenizer.with_template(b"{{ messages[0].content + 1 }}")
    with pytest.raises(ConfigError, match=r"a\.(jsonl, line|parquet, row) \d+: .*refuses a conversation \(TypeError"):
        list(pipeline.describe_sizes(dataclasses.replace(prepared, tokenizer=refusing), config))


def test_a_domain_without_an_example_is_refused(config):
    prepared = pipeline.prepare(config, 400, progress=lambda _: None)
    short = dataclasses.replace(config, sequence_length=8)  # no answer begins within the first eight tokens
    with pytest.raises(ConfigError, match=r"=8: no document of the training split of 'lines' has an example that fits"):
        pipeline.train_iterator(prepared, short, batch_size=4, seed=0)
    with pytest.raises(ConfigError, match=r"=8: no document of the held-out split of 'table' has an example that fits"):
        pipeline.heldout_batches(prepared, short, domain="table", batch_size=4)


def test_missing_requirements_of_conversations_are_named(config, tmp_path):
    def refuses(message, **changes):
        with pytest.raises(ConfigError, match=message):
            pipeline.prepare(dataclasses.replace(config, **changes), 400, progress=lambda _: None)

    refuses("holds conversations .*; set data.objective=chat", objective="causal", domains=("table",))
    refuses("^conversations: a tokenizer trained on the text has no chat template", tokenizer="")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    refuses("has no chat template .*; set data.chat_template")
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    own = dataclasses.replace(config, chat_template=str(tmp_path / "own.jinja"))
    prepared = pipeline.prepare(own, 400, progress=lambda _: None)
    assert set(prepared.tokenizer.files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.txt").write_text("plain\n\n" * 4000)
    with pytest.raises(ConfigError, match="needs documents with messages, prompt and response"):
        pipeline.prepare(dataclasses.replace(own, dataset=str(tmp_path / "plain")), 400, progress=lambda _: None)


def test_a_run_with_a_template_is_evaluated_on_plain_text(tmp_path, monkeypatch):
    config = tiny(tmp_path, **{"data.objective": "chat", "data.chat_template": "own.jinja"})
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    monkeypatch.setattr(open_workdir.pipeline, "prepare_run", lambda config, **_: config.data)
    monkeypatch.setattr(open_workdir, "find_tokenizer", lambda *_, **__: None)
    monkeypatch.setattr(open_workdir, "build", lambda *_: None)
    for objective, template in ((None, ""), ("causal", "")):
        opened = open_workdir.open_workdir(str(tmp_path), {("data", "objective"): objective})
        assert opened.prepared.chat_template == template


@pytest.mark.slow
def test_prompts_and_standard_input_give_the_same_chat(tmp_path):
    """Two turns by --prompt and by standard input give the same answers; the second depends on the first."""
    config = tiny(tmp_path, **{"data.objective": "chat", "model.num_layers": 1})
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        parameters = build(config, mesh).init().parameters
    run = tmp_path / "run"
    write_run(run, config, parameters)
    for name, content in tokenizer("llama3").files.items():
        (run / name).write_bytes(content)
    command = [sys.executable, "-m", "moe", "generate", f"--workdir={run}", "--chat", "--tokens=6", "--temperature=0"]

    def talk(*words, typed=""):
        done = subprocess.run([*command, *words], cwd=ROOT, input=typed, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    given = talk("--prompt=What is a router?", "--prompt=And a gate?")
    assert given.count("\n") >= 2
    assert talk(typed="What is a router?\n\nAnd a gate?\n") == given
    assert talk("--prompt=And a gate?") != given
