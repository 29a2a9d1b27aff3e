"""What a user can get wrong: each ends with an exit code, one sentence that says what and what is allowed, and nothing
left behind.

A case runs an entry point as `python main.py ...` does, but in this process; a few at the end in one of their own.
`python -m pytest tests/test_bad_input.py -s` prints how many there were.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from absl import flags

from moe import cli
from moe.config import Config, to_dict
from moe.data import pipeline
from moe.interop import import_checkpoint
from moe.routing.resolve import from_config_dict
from tests.tiny_text import build

ROOT = Path(__file__).parents[1]
OPEN = Path(__file__).parent / "data" / "checkpoints" / "mixtral"
TINY = (
    "--config=configs/quickstart.py",
    "--config.data.dataset=tiny_text/split",
    "--config.data.directory={data}",
    "--config.model.vocab_size=400",
    "--config.data.sequence_length=16",
    "--config.data.heldout_rows=8",
    "--workdir={new}/run",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """`{new}` in arguments is an empty folder, `{data}` prepared text, `{run}` an imported model, `{open}` an open one.

    `break_it` changes copies of the last two, or puts something in the first.
    """

    script: str
    arguments: tuple[str, ...]
    says: tuple[str, ...]
    break_it: Callable[[Path], None] | None = None


def main(*arguments: str, says: str | tuple[str, ...], break_it: Callable[[Path], None] | None = None) -> Case:
    """A case of main.py: these arguments, and the others of TINY."""
    given = {argument.partition("=")[0] for argument in arguments}
    tiny = [argument for argument in TINY if argument.partition("=")[0] not in given]
    ordered = sorted([*tiny, *arguments], key=lambda argument: not argument.startswith("--config="))  # it comes first
    return Case("main.py", tuple(ordered), (says,) if isinstance(says, str) else says, break_it)


def script(
    name: str, *arguments: str, says: str | tuple[str, ...], break_it: Callable[[Path], None] | None = None
) -> Case:
    return Case(f"scripts/{name}.py", arguments, (says,) if isinstance(says, str) else says, break_it)


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Puts a file in the case's folder."""

    def put(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return put


def remove(name: str) -> Callable[[Path], None]:
    def take(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return take


def change(name: str, **fields) -> Callable[[Path], None]:
    """Changes fields of a JSON file; a value of None takes the field out."""

    def edit(folder: Path) -> None:
        tree = json.loads((folder / name).read_text()) | fields
        (folder / name).write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))

    return edit


def cut(pattern: str, keep: float) -> Callable[[Path], None]:
    """Truncates the files of a pattern to a share of their size."""

    def truncate(folder: Path) -> None:
        paths = [path for path in folder.glob(pattern) if path.is_file()]
        assert paths, pattern
        for path in paths:
            os.truncate(path, int(keep * path.stat().st_size))

    return truncate


def rename_tensor(folder: Path) -> None:
    path = folder / "open" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    name = sorted(tensors)[0]
    safetensors.numpy.save_file({(key + "x" if key == name else key): value for key, value in tensors.items()}, path)


def turn_tensor(folder: Path) -> None:
    path = folder / "open" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["lm_head.weight"] = np.ascontiguousarray(tensors["lm_head.weight"].T)
    safetensors.numpy.save_file(tensors, path)


def value(field: str, text: str, allowed: str) -> Case:
    """A value that main.py refuses, naming the field and what is allowed."""
    return main(f"--config.{field}={text}", says=(field, allowed))


CASES = [
    # Flags
    main("--workdir=", says=("--workdir", "must not be empty")),
    main("--config=configs/absent.py", says=("--config", "absent.py")),
    main("--config=", says="--config"),
    main("--config={new}", says="--config"),
    main("--config=README.md", says="--config"),
    main("--config={new}/x.py", says=("--config", "get_config"), break_it=write("x.py", "x = 1\n")),
    main("--config={new}/x.py", says=("--config", "SyntaxError"), break_it=write("x.py", "def get_config(:\n")),
    main("--config={new}/x.py", says=("--config", "ZeroDivisionError"), break_it=write("x.py", "1 / 0\n")),
    main("--config={new}/x.py", says="--config", break_it=write("x.py", "def get_config():\n    return 3\n")),
    main("--config=configs/switch_twin.py:huge", says=("switch_twin.py:huge", "base, large, xxl, c")),
    main("--confg=x", says=("confg", "Did you mean")),
    main("--steps=3", says="steps"),
    main("surplus", says=("surplus", "options start with --")),
    main("--distributed=maybe", says="distributed"),
    main("--config.model.moe.num_expert=3", says="did you mean model.moe.num_experts"),
    main("--config.modle.d_model=3", says="did you mean model"),
    main("--config.model.d_model.x=3", says="model.d_model is a single value"),
    main("--config.model=3", says=("--config.model",)),
    Case("main.py", (), ("--config", "--workdir")),
    # Numbers
    value("model.d_model", "wide", "must be int"),
    value("model.d_model", "3.5", "must be int"),
    value("model.d_model", "-4", "at least 1"),
    value("model.d_model", "0", "at least 1"),
    value("model.num_layers", "0", "at least 1"),
    value("model.num_layers", "99999999999999999999", "at most"),
    value("model.num_layers", "20000", "at most 10000"),
    value("model.vocab_size", "", "must be int"),
    value("model.vocab_size", "-1", "at least 1"),
    value("model.head_dim", "7", "must be even"),
    value("model.num_kv_heads", "3", "must divide model.num_heads"),
    value("model.norm_eps", "nan", "finite"),
    value("model.rope_theta", "inf", "finite"),
    value("model.rope_theta", "-1.0", "must be positive"),
    value("model.clip_qkv", "-1.0", "at least 0"),
    value("model.init_scale", "0.0", "must be positive"),
    value("model.init_scale", "1e300", "finite"),
    value("model.tie_embeddings", "perhaps", "must be bool"),
    value("model.sliding_window_layers", "(0,9)", "from 0 to 3"),
    value("model.sliding_window_layers", "every", "must be int"),
    value("model.activation", "silu", "swiglu, geglu"),
    value("model.dtype", "float16", "float32, bfloat16"),
    value("model.remat", "always", "none, dots, full"),
    value("model.attention", "flash", "full, blocked"),
    value("model.moe.gate", "mixtrall", "must be one of none"),
    value("model.moe.gate", "expert_choice", "accept_future_leak"),
    value("model.moe.num_experts", "0", "at least 1"),
    value("model.moe.experts_per_token", "9", "at most num_experts=8"),
    value("model.moe.capacity_factor", "nan", "finite"),
    value("model.moe.capacity_factor", "-2.0", "must be positive"),
    value("model.moe.jitter", "1.5", "in [0, 1)"),
    value("model.moe.z_loss_weight", "-0.5", "at least 0"),
    value("model.moe.dispatch", "scatter", "gather, einsum, dropless"),
    value("model.moe.layers", "(3,2)", "increasing"),
    value("model.moe.group_size", "100", "must divide"),
    value("model.moe.load_weight", "1.0", "needs the gate noisy_topk"),
    value("seed", "-1", "at least 0"),
    value("seed", "lucky", "must be int"),
    value("optimizer.learning_rate", "nan", "finite"),
    value("optimizer.learning_rate", "0.0", "must be positive"),
    value("optimizer.b2", "1.0", "in [0, 1)"),
    value("optimizer.weight_decay", "-0.1", "at least 0"),
    value("optimizer.warmup_steps", "160", "below train.num_steps"),
    value("optimizer.frozen", "('gate',)", "embedding, unembedding"),
    value("optimizer.frozen", "rooter", "embedding, unembedding"),
    value("train.num_steps", "0", "at least 1"),
    value("train.batch_size", "-8", "at least 1"),
    value("train.accumulation_steps", "3", "must divide train.batch_size=16"),
    value("train.save_every", "0", "at least 1"),
    value("train.keep_checkpoints", "0", "at least 1"),
    value("train.sample_tokens", "-1", "at least 0"),
    value("train.spike_sigmas", "inf", "finite"),
    value("train.on_skipped_steps", "pray", "rollback, stop"),
    value("mesh.expert", "0", "must be positive, or -1"),
    value("mesh.data", "many", "must be int"),
    value("mesh.expert", "3", "number of devices, 8"),
    main("--config.mesh.expert=-1", says=("mesh", "only one axis can be -1")),
    main("--config.mesh.data=1", "--config.mesh.tensor=8", says=("model.num_kv_heads=4", "mesh.tensor = 8")),
    main("--config.train.batch_size=4", says=("train.batch_size", "divisible by")),
    # Text
    value("data.dataset", "", "must name a dataset"),
    value("data.dataset", "nowhere", "download_and_prepare"),
    value("data.dataset", "tiny_text/absent", "download_and_prepare"),
    value("data.dataset", "c4/en", 'tfds.builder("c4/en"'),
    value("data.dataset", "lm1b", 'tfds.builder("lm1b"'),
    value("data.dataset", "wiki40b", 'tfds.builder("wiki40b"'),
    value("data.dataset", "tiny_shakespeare", 'tfds.builder("tiny_shakespeare"'),
    value("data.dataset", "ftp://host/text", "gs, s3, az, hf before ://"),
    value("data.directory", "nowhere://data", "gs, s3, az, hf before ://"),
    value("data.dataset", "../..//weird name:1.0", "data.dataset"),
    value("data.dataset", "/nowhere/at/all", "no such folder"),
    value("data.dataset", "gs://nowhere/text", "gs://nowhere/text"),
    main("--config.data.dataset={new}", says=("data.dataset", "no text in .txt or .jsonl")),
    main(
        "--config.data.dataset={new}",
        "--config.data.directory={new}/cache",
        says=("a.jsonl, line 2", "JSON"),
        break_it=write("a.jsonl", '{"text": "x"}\n{"text": '),
    ),
    main(
        "--config.data.dataset={new}",
        "--config.data.directory={new}/cache",
        says=("a.txt, line 1", "UTF-8"),
        break_it=write("a.txt", b"caf\xe9"),
    ),
    value("data.domains", "('poems',)", "allowed are ['tiny_text/split']"),
    value("data.domains", "('a','a')", "each domain once"),
    value("data.domains", "literature", "allowed are ['tiny_text/split']"),
    value("data.weights", "(1.0,1.0)", "one for each of the 1 domains"),
    value("data.weights", "(0.0,)", "positive"),
    value("data.weights", "(1e999,)", "finite"),
    value("data.weights", "('x',)", "must be float"),
    value("data.directory", "", "must name a folder"),
    value("data.directory", "/proc/nowhere", "cannot be written"),
    value("data.directory", "README.md", "cannot be written"),
    value("data.sequence_length", "1", "at least 2"),
    value("data.sequence_length", "100000", "use at most"),
    value("data.streams", "3", "must divide train.batch_size=16"),
    value("data.streams", "-1", "must divide"),
    value("data.shuffle_window", "0", "at least 1"),
    value("data.heldout_rows", "0", "at least 1"),
    value("data.tokenizer", "/nowhere/tokenizer.model", "no such file"),
    value("data.tokenizer", "/nowhere/tokenizer.json", "no such file"),
    main(
        "--config.data.tokenizer={new}/tokenizer.model",
        says=("data.tokenizer", "not a SentencePiece model"),
        break_it=write("tokenizer.model", b"\x80\x04K\x01."),
    ),
    main(
        "--config.data.tokenizer={new}/tokenizer.json",
        says=("data.tokenizer", "not a tokenizer.json"),
        break_it=write("tokenizer.json", "{"),
    ),
    value("model.vocab_size", "100", "no tokenizer of that size"),
    # Workdirs and checkpoints of main.py
    main("--workdir={new}/file", says="--workdir", break_it=write("file", "mine")),
    main("--workdir={new}/file/run", says="--workdir", break_it=write("file", "mine")),
    main("--workdir=/proc/run", says="--workdir"),
    main("--workdir=gs://bucket/run", says=("--workdir=gs://bucket/run", "mount the bucket")),
    main("--workdir=s3://bucket/run", says=("--workdir", "folder of a file system")),
    main("--workdir={new}/run", says="run/config.json", break_it=write("run/config.json", "{")),
    main("--workdir={new}/run", says="run/config.json", break_it=write("run/config.json", "[]")),
    main("--workdir={new}/run", says="run/config.json", break_it=write("run/config.json", b"\xff\xfe")),
    main("--workdir=nowhere://run", says=("--workdir", "gs, s3, az, hf before ://")),
    main("--workdir={run}", says=("--workdir", "no config.json"), break_it=remove("run/config.json")),
    main("--workdir={run}", says=("--workdir", "another config", "model.d_model")),
    value("start.checkpoint", "/nowhere", "no such file"),
    value("start.checkpoint", "nowhere://run", "gs, s3, az, hf before ://"),
    main("--config.start.checkpoint={new}", says=("config.json", "no such file")),
    value("start.optimizer", "keep", "reset, carry"),
    value("start.expert_noise", "nan", "finite"),
    value("distill.teacher", "/nowhere", "no such file"),
    value("distill.soft_share", "2.0", "in [0, 1]"),
    # Scripts
    script("generate", "--prompt=x", says="workdir"),
    script("generate", "--workdir=/nowhere", "--prompt=x", says="/nowhere/config.json: no such file"),
    script("generate", "--workdir={run}", "--prompt=x", says="config.json", break_it=write("run/config.json", "{")),
    script("generate", "--workdir={run}", "--prompt=x", says="modle", break_it=change("run/config.json", modle=3)),
    script("generate", "--workdir={run}", "--prompt=x", says="seed", break_it=change("run/config.json", seed="x")),
    script("generate", "--workdir={run}", "--prompt=x", says="tokenizer.model", break_it=remove("run/tokenizer.model")),
    script(
        "generate",
        "--workdir={run}",
        "--prompt=x",
        says="not a SentencePiece model",
        break_it=write("run/tokenizer.model", b"x" * 99),
    ),
    script("generate", "--workdir={run}", "--prompt=x", says="no checkpoint", break_it=remove("run/checkpoints")),
    script("generate", "--workdir={run}", "--prompt=x", "--step=7", says="no checkpoint of step 7"),
    script("generate", "--workdir={run}", "--prompt=x", "--step=-7", says="no checkpoint of step -7"),
    script("generate", "--workdir={run}", "--prompt=x", "--tokens=0", says="tokens"),
    script("generate", "--workdir={run}", "--prompt=x", "--tokens=many", says="tokens"),
    script("generate", "--workdir={run}", "--prompt=x", "--temperature=-1", says="temperature"),
    script("generate", "--workdir={run}", "--prompt=x", "--temperature=nan", says="temperature"),
    script("generate", "--workdir={run}", "--prompt=x", "--top_k=-1", says="top_k"),
    script("generate", "--workdir={run}", "--prompt=x", "--top_p=0", says="top_p"),
    script("generate", "--workdir={run}", "--prompt=\N{GREEK SMALL LETTER ALPHA}", says="from 0 to 31"),
    script("generate", "--workdir={run}", "--prompt=x", "--mesh=experts=2", says=("--mesh", "data, fsdp")),
    script("generate", "--workdir={run}", "--prompt=x", "--mesh=data=three", says=("--mesh", "axis=size")),
    script("generate", "--workdir={run}", "--prompt=x", "--mesh=data=3", says="number of devices, 8"),
    script("evaluate", "--workdir=/nowhere", says="/nowhere/config.json: no such file"),
    script("evaluate", "--workdir=nowhere://run", says=("--workdir", "gs, s3, az, hf before ://")),
    script("evaluate", "--workdir={run}", "--dataset=nowhere", "--directory={data}", says="data.dataset='nowhere'"),
    script(
        "evaluate",
        "--workdir={run}",
        "--dataset=tiny_text/split",
        "--directory={data}",
        "--rows=0",
        says="heldout_rows",
    ),
    script("evaluate", "--workdir={run}", "--domains=poems", says=("data.domains", "literature")),
    script("evaluate", "--workdir={run}", "--batch_size=-8", says="train.batch_size"),
    script("evaluate", "--workdir={run}", "--sequence_length=x", says="sequence_length"),
    script("import_hf", "--source=/nowhere", "--out={new}/out", says="/nowhere"),
    script("import_hf", "--source={open}", "--out={run}", says="checkpoints"),
    script("import_hf", "--source={open}", "--out={new}/out", "--dtype=int8", says=("dtype", "float32")),
    script(
        "import_hf", "--source={open}", "--out={new}/out", says="config.json", break_it=write("open/config.json", "{")
    ),
    script(
        "import_hf",
        "--source={open}",
        "--out={new}/out",
        says="model_type",
        break_it=change("open/config.json", model_type="t5", architectures=["T5"]),
    ),
    script(
        "import_hf",
        "--source={open}",
        "--out={new}/out",
        says="hidden_size",
        break_it=change("open/config.json", hidden_size=None),
    ),
    script(
        "import_hf",
        "--source={open}",
        "--out={new}/out",
        says="safetensors",
        break_it=remove("open/model.safetensors"),
    ),
    script(
        "import_hf",
        "--source={open}",
        "--out={new}/out",
        says="safetensors",
        break_it=cut("open/model.safetensors", 0.5),
    ),
    script(
        "import_hf",
        "--source={open}",
        "--out={new}/out",
        says="safetensors",
        break_it=write("open/model.safetensors", b"\x80\x04K\x01."),
    ),
    script("import_hf", "--source={open}", "--out={new}/out", says="weight", break_it=rename_tensor),
    script("import_hf", "--source={open}", "--out={new}/out", says="lm_head", break_it=turn_tensor),
    script("export_hf", "--workdir=/nowhere", "--out={new}/out", says="/nowhere/config.json: no such file"),
    script("export_hf", "--workdir={run}", "--out={new}/out", "--model_type=t5", says="t5"),
    script("export_hf", "--workdir={run}", "--out={new}/out", "--dtype=int8", says="dtype"),
    script("export_hf", "--workdir={run}", "--out={new}/out", says="checkpoint", break_it=remove("run/checkpoints/0")),
    script(
        "export_hf",
        "--workdir={run}",
        "--out={new}/out",
        says="checkpoints",
        break_it=cut("run/checkpoints/0/state/d/*", 0.3),
    ),
    script("export_hf", "--workdir={run}", "--out={new}/file", says="file", break_it=write("file", "mine")),
    script("plan_pod", "--topology=v5p:4x4x4", says="config"),
    script("plan_pod", "--config=configs/mixtral_8x7b.py", "--topology=v99:4x4", says="v99"),
    script("plan_pod", "--config=configs/mixtral_8x7b.py", "--topology=v5p", says="topology"),
    script("plan_pod", "--config=configs/mixtral_8x7b.py", "--topology=v5p:4x4x4", "--num_slices=0", says="num_slices"),
    script("bench_moe", "--shapes=C", says=("shapes", "sweep")),
    script("bench_moe", "--gates=mixtrall", says=("gates", "mixtral")),
    script("bench_moe", "--modes=scatter", says=("modes", "gather")),
    script("bench_moe", "--experts_alone", "--model", says="experts_alone"),
    script("bench_moe", "--experts=some", says="experts"),
    script("bench_moe", "--tokens=0", says="tokens"),
    script("bench_moe", "--d_model=-4", says="d_model"),
    script("bench_moe", "--mesh=experts=2", says=("mesh", "expert")),
    script("mfu", "--steps=1", says="steps"),
    script("mfu", "--config.model.d_model=-1", says="model.d_model"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prepared text, with the tokenizer that TINY asks for."""
    folder = build(tmp_path_factory.mktemp("data"))
    tree = to_dict(Config())
    tree["data"] |= {"dataset": "tiny_text/split", "directory": str(folder), "sequence_length": 16}
    pipeline.prepare(from_config_dict(tree).data, 400, progress=lambda _: None)
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("imported") / "run"
    import_checkpoint(OPEN, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.copy(next((data / "tokenizers").iterdir()), folder / "tokenizer.model")
    return folder


def tree_of(*folders: Path) -> dict[str, bytes | None]:
    return {
        str(path): path.read_bytes() if path.is_file() else None for folder in folders for path in folder.rglob("*")
    }


def run_here(script: str, arguments: list[str], monkeypatch) -> tuple[int, str]:
    """(exit code, stderr) of `python script arguments`, in this process."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(os, "environ", os.environ.copy() | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"})
    monkeypatch.chdir(ROOT)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    assert cli  # whose flag is defined once, when it is imported; an entry point's own go after it
    known = set(flags.FLAGS)
    sys.modules.pop("config_config", None)  # what ml_collections calls a config file: a second one would add to it
    output, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):  # what the interpreter would print
            return 1, errors.getvalue() + end.code
        return int(end.code or 0), errors.getvalue()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
    return 0, errors.getvalue()


def prepare(case: Case, folder: Path, data: Path, imported: Path) -> list[str]:
    """The case's arguments, its folder filled."""
    text = " ".join(case.arguments)
    if "{run}" in text:
        shutil.copytree(imported, folder / "run")
    if "{open}" in text:
        shutil.copytree(OPEN, folder / "open")
    if case.break_it:
        case.break_it(folder)
    places = {"new": folder, "data": data, "run": folder / "run", "open": folder / "open"}
    return [argument.format(**places) for argument in case.arguments]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.script} {' '.join(case.arguments[-1:])}")
def test_refused(case, data, imported, tmp_path, monkeypatch):
    arguments = prepare(case, tmp_path, data, imported)
    before = tree_of(tmp_path, data)
    code, errors = run_here(case.script, arguments, monkeypatch)
    assert code != 0, "accepted"
    for word in case.says:
        assert word in errors
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1, errors
    assert tree_of(tmp_path, data) == before


@pytest.mark.parametrize(
    ("case", "traceback"),
    [
        (value("model.moe.num_experts", "0", "at least 1"), False),
        (value("model.moe.num_experts", "0", "at least 1"), True),
        (value("data.dataset", "/nowhere/at/all", "no such folder"), False),
    ],
)
def test_in_a_process_of_its_own(case, data, imported, tmp_path, traceback):
    arguments = prepare(case, tmp_path, data, imported)
    result = subprocess.run(
        [sys.executable, str(ROOT / case.script), *arguments, *(["--traceback"] if traceback else [])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert not list(tmp_path.iterdir())
    assert ("Traceback" in result.stderr) == traceback
    for word in case.says:
        assert word in result.stderr
    if not traceback:
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.strip().splitlines()) == 1


def test_there_are_enough_of_them():
    print(f"\n{len(CASES)} wrong inputs")
    assert len(set(CASES)) == len(CASES) >= 80
