"""Checkpoints, tokenizers and datasets are data: nothing in them is executed, and downloads are checked by hash."""

from __future__ import annotations

import ast
import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from moe.checkpoints import parameters
from moe.checkpoints.workdir import read_config
from moe.config import (
    Changes,
    ConfigError,
    DataConfig,
    allow_modules,
    inherited,
    read_run,
    references,
)
from moe.data import pipeline, preparation, wheels
from moe.data.tokenizer_files import read_tokenizer
from moe.interop import export_checkpoint, import_checkpoint
from moe.programs import cli
from moe.system import atomic_files, escaping
from moe.system.atomic_files import write_atomic
from moe.system.sealed_folder import unsealed
from moe.training import open_workdir, report
from tests.tiny_text import random_text

ROOT = Path(__file__).parents[1]
#: Modules whose loaders can execute what they load, and builtins that execute text.
RUNS_CODE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
#: Where a user's program is executed: a suite of ablations, named on the command line as a config file is.
PROGRAMS = {"moe/config/references.py"}

#: Calls that write in place: they follow a link of that name, and leave a partial file on a full disk.
WRITES = {"write_text", "write_bytes", "savefig", "savez", "savez_compressed"}
WRITERS = {
    "moe/system/atomic_files.py",
    "moe/system/npz_files.py",
    "scripts/kill_runs.py",
}  # kill_runs.py writes the text of its own test

#: Files that import torch to time it, or to record a block of the caller's process, and load no file with it.
COMPUTES_WITH_TORCH = {"scripts/gpu_report.py", "moe/conformance/judge/torch_recorder.py"}


class _Planted:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def payload(tmp_path):
    """A pickle that creates the file `ran` when it is loaded; asserts at the end that nothing did."""
    ran = tmp_path / "ran"
    content = pickle.dumps(_Planted(ran))
    pickle.loads(content)
    assert ran.exists()  # the pickle works
    ran.unlink()
    yield content
    assert not ran.exists()


@pytest.fixture
def no_unpickling():
    """The classes that unpickling looked up, asserted empty at the end; the audit hook is added once, as none can be
    removed."""
    if not hasattr(sys, "_moe_unpickled"):
        sys._moe_unpickled = []
        sys.addaudithook(lambda event, args: sys._moe_unpickled.append(args) if event == "pickle.find_class" else None)
    sys._moe_unpickled.clear()
    yield sys._moe_unpickled
    assert not sys._moe_unpickled


def _sources():
    found = [path for folder in ("moe", "scripts", "configs") for path in (ROOT / folder).rglob("*.py")]
    # Workers run in an environment of another library, on cases and code that this package writes for them.
    return [path for path in found if path.parent != ROOT / "moe" / "conformance" / "peers" / "workers"]


def _offences(tree, name):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            refused = RUNS_CODE - {"torch"} if name in COMPUTES_WITH_TORCH else RUNS_CODE
            yield from (module for module in modules if module.split(".")[0] in refused)
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in CALLS:
                yield called.id
            if isinstance(called, ast.Attribute) and called.attr == "load" and getattr(called.value, "id", "") == "np":
                allowed = [keyword.value for keyword in node.keywords if keyword.arg == "allow_pickle"]
                if not (allowed and isinstance(allowed[0], ast.Constant) and allowed[0].value is False):
                    yield "np.load without allow_pickle=False"
            if isinstance(called, ast.Attribute) and called.attr == "exec_module" and name not in PROGRAMS:
                yield "exec_module"
            if isinstance(called, ast.Attribute) and called.attr in WRITES and name not in WRITERS:
                yield f"{called.attr}: moe/system/atomic_files.py writes all files"
        if isinstance(node, ast.keyword) and node.arg == "shell":
            yield "shell="


def test_no_code_of_ours_can_execute_what_it_reads():
    assert len(_sources()) > 50
    found = {}
    for path in _sources():
        name = path.relative_to(ROOT).as_posix()
        if offences := list(_offences(ast.parse(path.read_text()), name)):
            found[name] = offences
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from torch import load",
        "import yaml.loader",
        "eval('1')",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "loader.exec_module(m)",
        "subprocess.run('ls', shell=True)",
        "path.write_text('x')",
        "np.savez(path, x=x)",
    ],
)
def test_the_check_finds_forbidden_calls(line):
    assert list(_offences(ast.parse(line), "moe/x.py"))


def test_a_pickle_in_place_of_a_tokenizer(tmp_path, payload, no_unpickling):
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_bytes(payload)
        with pytest.raises(ConfigError, match=r"data\.tokenizer=.*: not a"):
            read_tokenizer(tmp_path / name)


def test_pickles_in_place_of_open_weights(tmp_path, payload, no_unpickling):
    source = tmp_path / "open"
    source.mkdir()
    given = Path(__file__).parent / "data" / "checkpoints" / "mixtral" / "config.json"
    (source / "config.json").write_bytes(given.read_bytes())
    (source / "pytorch_model.bin").write_bytes(payload)
    with pytest.raises(ConfigError, match=r"pickled weights \(\*\.bin\) can run code and are not read"):
        import_checkpoint(source, tmp_path / "out")
    (source / "model.safetensors").write_bytes(payload)
    with pytest.raises(ConfigError, match="safetensors"):
        import_checkpoint(source, tmp_path / "out")


def test_pickles_planted_in_a_checkpoint(tmp_path, payload, no_unpickling):
    """A pickle beside the files, and in place of each of them: the checkpoint is read as before, or refused."""
    source = Path(__file__).parent / "data" / "checkpoints" / "mixtral"
    config = import_checkpoint(source, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "0"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    before = parameters.read_parameters(tmp_path / "run", config.model)
    for name in ("state.pkl", "data.pickle", "__init__.py"):
        (folder / name).write_bytes(payload)
    jax.tree.map(
        np.testing.assert_array_equal, before, parameters.read_parameters(tmp_path / "run", config.model)
    )  # planted pickles are ignored
    for replaced in ([path for path in files if path.parent.name == "d"], files):
        for path in replaced:
            path.write_bytes(payload)
        with pytest.raises(Exception, match=r".") as refusal:  # Orbax and TensorStore raise their own errors
            parameters.read_parameters(tmp_path / "run", config.model)
        assert not isinstance(refusal.value, pickle.UnpicklingError)


def test_pickles_in_place_of_the_saved_data_position(tmp_path, payload, no_unpickling):
    texts = [random_text(i) for i in range(20)]
    prepared = preparation.Prepared(SimpleNamespace(files={}, bos_id=1, eos_id=2, pad_id=0), ("x",), {"x": texts}, {})
    prepared.tokenizer.encode = lambda text: np.arange(3, 3 + len(text), dtype=np.int32)
    iterator = pipeline.train_iterator(prepared, DataConfig(sequence_length=8), batch_size=2, seed=0)
    handler = pipeline.streams.StreamsHandler()
    handler.save(epath.Path(tmp_path), iterator)
    files = list(tmp_path.glob("stream_*.json"))
    assert len(files) == 2
    for path in files:
        path.write_bytes(payload)
    with pytest.raises(ValueError, match=r"utf-8|Expecting value"):
        handler.restore(epath.Path(tmp_path), iterator)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "places.npy"])
def test_pickles_in_place_of_text(tmp_path, payload, no_unpickling, name):
    folder, cache = tmp_path / "text", tmp_path / "cache"
    folder.mkdir()
    (folder / "b.txt").write_text("".join(random_text(i) + "\n\n" for i in range(200)))
    data = DataConfig(dataset=str(folder), directory=str(cache), sequence_length=16, heldout_rows=4)
    if name.startswith("a"):
        (folder / name).write_bytes(payload)
    else:
        pipeline.prepare(data, 400, progress=lambda _: None)
        objects = io.BytesIO()
        np.save(objects, np.array([_Planted(tmp_path / "ran")], object), allow_pickle=True)
        index = next((cache / "folders").iterdir())
        (index / name).write_bytes(objects.getvalue())
    with pytest.raises(ConfigError, match=r"is not UTF-8 text|a damaged index"):
        pipeline.prepare(data, 400, progress=lambda _: None)


def test_a_wheel_with_a_changed_byte_is_not_used(tmp_path, monkeypatch):
    """A wheel with another hash is refused on disk, and pip is told to require the hash."""
    wheel = tmp_path / "wheel"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sympy/a.py", "x = 1\n")
    content = wheel.read_bytes()
    spec = wheels.Wheel("sympy", "1.14.0", hashlib.sha256(content).hexdigest())
    (tmp_path / spec.filename).write_bytes(content)
    assert wheels.fetch_wheel(spec, tmp_path, lambda _: None).read_bytes() == content
    (tmp_path / spec.filename).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    asked = []

    def pip(command, **_):
        requirements = Path(command[command.index("-r") + 1]).read_text()
        asked.append((command, requirements))
        return subprocess.CompletedProcess(command, 1, "", "THESE PACKAGES DO NOT MATCH THE HASHES")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    with pytest.raises(ConfigError, match="DO NOT MATCH THE HASHES"):
        wheels.fetch_wheel(spec, tmp_path, lambda _: None)
    ((command, requirements),) = asked
    assert "--require-hashes" in command
    assert "--no-deps" in command
    assert requirements == f"sympy==1.14.0 --hash=sha256:{spec.sha256}\n"
    assert sorted(os.listdir(tmp_path)) == [spec.filename, "wheel"]


def test_orbax_checkpoints_contain_no_pickled_class(tmp_path, no_unpickling):
    """Checkpoints are arrays and JSON; restoring one loads no class from a pickle."""
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.Composite(state=ocp.args.StandardSave({"x": np.ones(3)})))
        manager.wait_until_finished()
        manager.restore(0, args=ocp.args.Composite(state=ocp.args.StandardRestore({"x": np.ones(3)})))
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert not path.read_bytes().startswith((b"\x80\x04", b"\x80\x05"))


@pytest.fixture
def planted_module(tmp_path, monkeypatch):
    """A module `planted_gates` on the path that creates the file `ran` when it is imported."""
    folder = tmp_path / "modules"
    folder.mkdir()
    source = (
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from moe.config.registry import LAYERS\nrule = LAYERS['mixtral'].gate\n"
        "def optimizer(config, schedule):\n    raise AssertionError\n"
    )
    (folder / "planted_gates.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(references, "_allowed", set())
    yield tmp_path / "ran"
    sys.modules.pop("planted_gates", None)


@pytest.mark.parametrize("field", ["gate", "layer_gates"])
def test_a_module_named_in_a_workdir_is_not_imported_until_allowed(tmp_path, planted_module, field):
    """A module named in config.json is not imported by reading, continuing, exporting or starting from the workdir
    until the user allows it."""
    workdir = tmp_path / "run"
    import_checkpoint(Path(__file__).parent / "data" / "checkpoints" / "mixtral", workdir)
    content = unsealed((workdir / "config.json").read_text())
    content["model"]["moe"][field] = "planted_gates:rule" if field == "gate" else ["planted_gates:rule"]
    (workdir / "config.json").write_text(json.dumps(content))
    started = Changes()
    started.start.checkpoint = str(workdir)
    for read in (
        lambda: read_config(workdir),
        lambda: open_workdir.open_workdir(str(workdir), {}),
        lambda: inherited(started.settings),
        lambda: read_run(str(workdir / "config.json")),
        lambda: export_checkpoint(workdir, tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match=rf"json: model.moe.{field}='planted_gates:rule' .* --allow_module"):
            read()
    assert not planted_module.exists()
    allow_modules(["planted_gates"])
    read_config(workdir)
    assert planted_module.exists()


PROGRAM_IN_A_FOLDER = """
from moe.programs import cli

def main():
    import grain, orbax.checkpoint, tensorboardX, tokenizers
    from moe.config.references import import_object
    print(import_object("model.moe.gate", "wanted.inner:VALUE")() + import_object("optimizer.name", "plain:VALUE"))

cli.run(main)
"""


def test_the_current_directory_gives_only_modules_that_the_user_named(tmp_path):
    """Optional packages that libraries look for are not taken from a downloaded folder. What a named module imports,
    at once or later, may lie beside it; Python's own search path does not hold the folder."""
    planted = f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)\n"
    for name in ("torch", "boto3", "bcrypt", "brotli", "brotlicffi", "gcsfs", "pandas_gbq", "tensorflow", "unnamed"):
        (tmp_path / f"{name}.py").write_text(planted)
    (tmp_path / "wanted").mkdir()
    (tmp_path / "wanted" / "__init__.py").write_text("from . import inner\n")
    (tmp_path / "wanted" / "inner.py").write_text("def VALUE():\n    import beside\n    return beside.VALUE\n")
    (tmp_path / "beside.py").write_text("VALUE = 1\n")
    (tmp_path / "plain.py").write_text("VALUE = 2\n")
    command = [sys.executable, "-P", "-c", PROGRAM_IN_A_FOLDER]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "3\n"
    assert not (tmp_path / "ran").exists()


def test_reading_a_workdir_needs_no_optimizer(tmp_path, planted_module, monkeypatch):
    workdir = tmp_path / "run"
    import_checkpoint(Path(__file__).parent / "data" / "checkpoints" / "mixtral", workdir)
    content = unsealed((workdir / "config.json").read_text())
    content["optimizer"]["name"] = "planted_gates:optimizer"
    content["train"]["writers"] = ["planted_gates:writer"]
    (workdir / "config.json").write_text(json.dumps(content))
    config = read_config(workdir)
    parameters.read_parameters(workdir, config.model)
    monkeypatch.setattr(pipeline, "prepare_run", lambda config, tokenizer: None)
    monkeypatch.setattr(open_workdir, "find_tokenizer", lambda path, **_: None)
    open_workdir.open_workdir(str(workdir), {("train", "batch_size"): 8})
    assert not planted_module.exists()
    with pytest.raises(ConfigError, match=r"optimizer\.name='planted_gates:optimizer' is code .*=planted_gates"):
        read_run(str(workdir / "config.json"))  # continuing to train needs it


# --- Links, full disks, text -----------------------------------------------------------------------------------------
def test_a_planted_link_is_replaced_and_not_followed(tmp_path, pictures):
    """A temporary file of the report, and the report itself, are links to one of the user's files."""
    target = tmp_path / "precious"
    target.write_text("mine")
    for name in ("report.txt", "report.txt.0123abcd.tmp"):
        (tmp_path / name).symlink_to(target)
    write_atomic(tmp_path / "report.txt", "ours")
    report.figure(tmp_path / "training.png", [], {"all": 1.0})
    (tmp_path / "training.png").unlink()
    (tmp_path / "training.png").symlink_to(target)
    report.figure(tmp_path / "training.png", [], {"all": 1.0})
    assert target.read_text() == "mine"
    assert (tmp_path / "report.txt").read_text() == "ours"
    assert not any((tmp_path / name).is_symlink() for name in ("report.txt", "training.png"))


@contextlib.contextmanager
def full_disk(size):
    """Limit the size of every file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_are_appended_to_regular_files_only(tmp_path):
    (tmp_path / "target").write_text("theirs")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for a reader
    for name in ("link", "fifo"):
        with pytest.raises(OSError):  # noqa: PT011
            atomic_files.append(tmp_path / name, "ours")
    assert (tmp_path / "target").read_text() == "theirs"
    for line in ("1 é\n", "2\n"):
        atomic_files.append(tmp_path / "new", line)
    assert (tmp_path / "new").read_bytes() == "1 é\n2\n".encode()


def test_two_programs_write_one_path(tmp_path):
    """The first one ends while the second one has written half: no reader sees that half."""
    path, half, finished = tmp_path / "report.txt", threading.Event(), threading.Event()

    def parts():
        yield b"second, "
        half.set()
        finished.wait(10)
        yield b"whole"

    second = threading.Thread(target=write_atomic, args=(path, parts()))

    def first():
        yield b"first, "
        second.start()
        half.wait(10)
        yield b"whole"

    write_atomic(path, first())
    between = path.read_text()
    finished.set()
    second.join()
    assert (between, path.read_text()) == ("first, whole", "second, whole")
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_has_left_is_removed_by_the_next_one(tmp_path):
    path = tmp_path / "report.txt"
    killed = f"""
import os, signal
from pathlib import Path
from moe.system.atomic_files import write_atomic
def parts():
    yield b"x" * 100_000
    os.kill(os.getpid(), signal.SIGKILL)
write_atomic(Path({str(path)!r}), parts())
"""
    write_atomic(path, "good")
    assert subprocess.run([sys.executable, "-c", killed], cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert (path.read_text(), len(list(tmp_path.iterdir()))) == ("good", 2)
    write_atomic(path.with_name("report.txt.html"), "another file's writer leaves it")
    assert len(list(tmp_path.iterdir())) == 3
    write_atomic(path, "better")
    assert (path.read_text(), len(list(tmp_path.iterdir()))) == ("better", 2)


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, "*", "(a+)+$"])
def test_a_file_may_have_any_name(tmp_path, name):
    """The temporary file's name is not too long, and of what others have left only its own is removed."""
    (tmp_path / "b.0123abcd.tmp").write_text("of another file")
    (tmp_path / f"{name[:60]}.0123abcd.tmp").write_text("abandoned")
    write_atomic(tmp_path / name, "new")
    assert {path.name for path in tmp_path.iterdir()} == {name, "b.0123abcd.tmp"}
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder'$"):  # not the temporary file's name
        write_atomic(tmp_path / "folder", "new")


def test_a_file_is_renamed_once_the_disk_has_it(tmp_path, monkeypatch):
    """Some file systems, such as a full quota over a network, refuse what was written only then."""
    path = tmp_path / "report.txt"
    write_atomic(path, "good")

    def refuse(file):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=rf"Disk quota exceeded: '{path}'"):
        write_atomic(path, "better")
    assert (path.read_text(), list(tmp_path.iterdir())) == ("good", [path])


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "null").symlink_to("/dev/null")  # as with --output=/dev/null run by root
    with pytest.raises(ConfigError, match="null: is a device, and must be a file"):
        write_atomic(tmp_path / "null", "ours")
    assert [path.readlink() for path in tmp_path.iterdir()] == [Path("/dev/null")]


def test_a_full_disk_leaves_the_previous_file_intact(tmp_path):
    path = tmp_path / "analysis.json"
    write_atomic(path, "good")
    with full_disk(100), pytest.raises(OSError, match="too large") as caught:
        write_atomic(path, "x" * 10_000)
    said = cli._refusal(caught.value)
    assert said == f"{path}: File too large; free space, and run the same command again"
    assert (path.read_text(), list(tmp_path.iterdir())) == ("good", [path])


def test_import_and_export_to_a_full_disk_fail_in_one_sentence(tmp_path):
    source = Path(__file__).parent / "data" / "checkpoints" / "mixtral"
    import_checkpoint(source, tmp_path / "run")
    with (
        full_disk(2000),
        pytest.raises(ConfigError, match=r"out: cannot be written, and nothing .*too large"),
    ):
        export_checkpoint(tmp_path / "run", tmp_path / "out")
    with full_disk(2000), pytest.raises(ConfigError, match="again: cannot be written, and nothing was left"):
        import_checkpoint(source, tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_text_is_escaped_for_terminals_markdown_and_figures(tmp_path, pictures):
    assert escaping.terminal("a\tb\n\x1b]52;c;eA==\x07\x9b2J\r漢字é\u202e") == (
        "a\tb\n\\x1b]52;c;eA==\\x07\\x9b2J\\r漢字é\\u202e"
    )
    assert escaping.markdown_cell("a|b\nc\\|d") == "a\\|b c\\|d"
    assert escaping.markdown_page("p < 0.05, <img src=x onerror=y> <!-- </a>") == (
        "p < 0.05, &lt;img src=x onerror=y> &lt;!-- &lt;/a>"
    )
    assert escaping.markdown_text("a|<b>[c](d)\n$x$") == "a\\|&lt;b&gt;\\[c\\](d) \\$x\\$"
    assert escaping.markdown_text("d_model __init__ _x y_") == r"d_model \_\_init\_\_ \_x y\_"
    # A figure would fail at TeX that is none, and at half a character of an edited file.
    rows = [{"kind": f"heldout/{name}", "step": 1, "loss": 2.0} for name in ("$\\frac$", "\ud800", "all")]
    report.figure(tmp_path / "training.png", rows, {"all": 1.0})


def test_control_characters_in_output_are_escaped():
    code = "from moe.programs import cli\ncli.run(lambda: print('a\\x1b[2Jb'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "a\\x1b[2Jb\n"


def test_reports_are_utf8_in_every_locale(tmp_path):
    """In the C locale too, a report is UTF-8 and complete."""
    code = "import sys, pathlib\nfrom moe.system.atomic_files import write_atomic\n"
    code += f"write_atomic(pathlib.Path(sys.argv[1]), {'ü ± 漢 ' + chr(0xD800)!a})"
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "report.md"], env=environment, check=True)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == "ü ± 漢 \\ud800"
