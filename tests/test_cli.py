"""Command lines: which config file is loaded, what --help shows, and messages about what is missing."""

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from absl import flags

import moe
from moe.config import ConfigError, build_layers, inherited, read_run, to_dict
from moe.config.parse import from_config_dict
from moe.configs import mixtral, switch
from moe.interop.hub_cache import find_source
from moe.programs import cli, commands, help_text
from moe.system import shipped

ROOT = Path(__file__).parents[1]
NEEDED = ("config", "workdir")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("configs/mixtrl.py", "mixtral"),
        ("mixtrl", "mixtral"),
        ("configs/ablations/lenght.py", "configs/ablations/length.py"),
    ],
)
def test_a_missing_config_file_is_refused_with_the_nearest_name(name, nearest, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=f"--config={name}: no such file; did you mean {nearest}"):
        cli._with_config_file(["main.py", f"--config={name}"], NEEDED)


def test_a_name_unlike_any_config_gets_no_suggestion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"--config=zzz\.py: no such file; `moe configs` lists the names"):
        cli._with_config_file(["main.py", "--config", "zzz.py"], NEEDED)


def test_the_config_of_a_run_is_a_config_file_whose_fields_are_all_set(tmp_path):
    """Including fields that the run took from start.checkpoint: they are not inherited again from a changed
    checkpoint."""
    config = from_config_dict(switch.get_config())
    other = from_config_dict(mixtral.get_config())
    for name, tree in (("run", config), ("start", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(to_dict(tree)))
    file = str(tmp_path / "run" / "config.json")
    for words in (["--config", file, "--workdir=x"], [f"--config={file}", "--workdir=x"]):
        assert cli._with_config_file(["main.py", *words], NEEDED) == ["main.py", *words]
    settings = read_run(file) | {"start.checkpoint": str(tmp_path / "start")}
    assert {"seed", "model.moe.gate.k", "model.rope_scaling.kind", "train.num_steps"} <= settings.keys()
    assert build_layers(inherited(settings), settings).model == config.model


def test_a_file_that_is_not_the_config_of_a_run_is_refused(tmp_path):
    file = tmp_path / "config.json"
    for content in ('{"modle": {}}', "[]", "no JSON"):
        file.write_text(content)
        with pytest.raises(ConfigError, match=r"config\.json: not the config of a run"):
            read_run(str(file))


def test_a_workdir_without_a_config_flag_continues_with_its_own_config(tmp_path):
    with pytest.raises(ConfigError, match=r"--config is needed: .* holds no run to continue"):
        cli._with_config_file(["main.py", f"--workdir={tmp_path}"], NEEDED)
    (tmp_path / "config.json").write_text("{}")
    added = f"--config={tmp_path}/config.json"
    words = ["main.py", f"--workdir={tmp_path}", "--config.seed=1"]
    assert cli._with_config_file(words, NEEDED) == [*words, added]
    changed = ["main.py", f"--workdir={tmp_path}", "--change", "--config.train.num_steps=9"]
    assert cli._with_config_file(changed, NEEDED) == [*changed, added]
    assert cli._with_config_file(words, ("workdir",)) == words  # a program without a config


def test_help_shows_required_flags_then_options_examples_and_exit_codes():
    words = [sys.executable, "main.py", "--help"]
    narrow = os.environ | {"COLUMNS": "20"}  # less than the margin of the explanations
    shown = subprocess.run(words, cwd=ROOT, env=narrow, capture_output=True, text=True, check=True)
    parts = ["\nneeded", "  --config=FILE", "  --workdir", "\noptions", "  --change", "\nexamples", "\nexit codes"]
    places = [shown.stdout.index(part) for part in parts]
    assert places == sorted(places)
    assert shown.stdout.count("moe train --") >= 3


def test_flags_are_removed_with_their_values():
    argv = ["python", "a.py", "--jobs", "2", "--seeds=1", "-jobs=2", "--jobs=2", "--jobs_of=3"]
    assert cli.without_flags(argv, "jobs") == ["python", "a.py", "--seeds=1", "--jobs_of=3"]


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 60 bytes.\nmore"),
        MemoryError("60 bytes"),
    ],
)
def test_too_little_memory_is_said_in_one_sentence(error):
    sentence = cli._refusal(error)
    assert re.fullmatch(r"out of memory; more devices, .* need less \(\w+Error: .*60 bytes.*\)", sentence)


@pytest.mark.parametrize("words", [["main.py", "--help"], ["-m", "moe", "--help"], ["-m", "moe", "completion", "bash"]])
def test_a_closed_output_ends_a_program_without_an_error_message(words):
    """``main.py --help | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, *words], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_a_model_name_is_resolved_in_the_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    snapshots = tmp_path / "models--org--name" / "snapshots"
    for name in ("older", "main0"):
        (snapshots / name).mkdir(parents=True)
        (snapshots / name / "config.json").write_text("{}")
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("older")
    assert find_source("org/name") == str(snapshots / "older")
    (tmp_path / "models--org--name" / "refs" / "main").write_bytes(b"\xff")
    assert find_source("org/name").startswith(str(snapshots))
    (tmp_path / "models--org--name" / "refs" / "main").write_text("../../elsewhere")
    assert find_source("org/name").startswith(str(snapshots))
    assert find_source(str(tmp_path)) == str(tmp_path)
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_HOME", raising=False)
    tmp_path.rename(moved := tmp_path.with_name("hub"))
    (tmp_path / "huggingface").mkdir(parents=True)
    moved.rename(tmp_path / "huggingface" / "hub")
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable, value in (("XDG_CACHE_HOME", "$HOME"), ("HF_HUB_CACHE", "~/huggingface/hub")):
        monkeypatch.setenv(variable, value)
        assert find_source("org/name").startswith(str(tmp_path / "huggingface" / "hub"))
        monkeypatch.delenv(variable)
    with pytest.raises(ConfigError, match=r"--source=org/other: no such folder, .*`hf download org/other`"):
        find_source("org/other")


def test_a_name_stands_for_an_installed_config_in_any_folder(tmp_path, monkeypatch):
    """A file of the same name has priority, a folder not."""
    monkeypatch.chdir(tmp_path)
    path = str(shipped.CONFIGS / "mixtral_8x7b.py")
    for words in (["--config=mixtral_8x7b:v5p-128"], ["--config", "mixtral_8x7b:v5p-128"]):
        given = cli._with_config_file(["main.py", *words, "--workdir=x"], NEEDED)
        assert given == ["main.py", f"--config={path}:v5p-128", "--workdir=x"]
    assert shipped.find("mixtral_8x7b") == path
    assert shipped.short(f"{path}:v5p-128") == "mixtral_8x7b:v5p-128"
    for other in ("nowhere", "configs/mixtral.py", "mine.py:8", "capacity_factor"):
        assert shipped.find(other) == shipped.short(other) == other
    assert shipped.find("capacity_factor:8", shipped.SUITES) == f"{shipped.SUITES / 'capacity_factor.py'}:8"
    (tmp_path / "mixtral").mkdir()  # a workdir that is named after its config
    assert shipped.find("mixtral") == str(shipped.CONFIGS / "mixtral.py")
    (tmp_path / "switch").write_text("")
    assert shipped.find("switch") == "switch"


def test_every_installed_config_and_suite_is_listed_with_a_sentence():
    helpers = {shipped.CONFIGS: {"__init__", "published"}, shipped.SUITES: {"__init__", "common", "sizes"}}
    for folder, without in helpers.items():
        listed = shipped.describe(folder)
        assert {path.stem for path in folder.glob("*.py")} - {*listed} == without
        assert all(len(sentence) > 10 for sentence in listed.values())
    shown = subprocess.run(
        [sys.executable, "-m", "moe", "configs"], capture_output=True, text=True, check=True, cwd="/"
    )
    assert "\n  mixtral_8x7b " in shown.stdout
    assert "\n  capacity_factor " in shown.stdout


def test_every_command_is_a_program_and_an_entry_point():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts.pop("moe") == "moe.programs.commands:main"
    for name, target in scripts.items():
        program, _ = commands.COMMANDS[name.removeprefix("moe-")]
        assert getattr(commands, target.partition(":")[2]).args == (program,)
    programs = {path.stem for path in (ROOT / "moe" / "programs").glob("*.py")} - {
        "__init__",
        "cli",
        "commands",
        "help_text",
    }
    assert {program for program, _ in commands.COMMANDS.values()} == programs
    shown = subprocess.run([sys.executable, "-m", "moe", "trian"], cwd=ROOT, capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (1, "error: moe trian: no such command; did you mean train?\n")


def test_the_version_is_that_of_the_installed_distribution():
    assert moe.__version__ == importlib.metadata.version("moe-jax")
    for words in (["-m", "moe"], ["main.py"]):
        shown = subprocess.run([sys.executable, *words, "--version"], cwd=ROOT, capture_output=True, text=True)
        assert (shown.returncode, shown.stdout) == (0, f"moe-jax {moe.__version__}\n")


def test_another_distribution_with_a_package_of_the_same_name_is_named(tmp_path, monkeypatch):
    """Two distributions that write into one folder overwrite each other's files."""
    for name, file in (("Other-MoE", "moe/__init__.py"), ("moe-jax", "moe/__init__.py"), ("fine", "moest/__init__.py")):
        folder = tmp_path / f"{name}-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (folder / "RECORD").write_text(f"{file},,\n")
    installed = [*importlib.metadata.distributions(path=[str(tmp_path)])]
    assert len(installed) == 3
    assert commands.other_owners(installed) == ["Other-MoE"]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: installed)
    monkeypatch.setattr(moe, "__all__", ["theirs"])
    with pytest.raises(SystemExit, match=r"Other-MoE also installs a top-level package moe, in .*; keep it in another"):
        commands.start("train")


#: Writes the help of each program into a folder, each in a fork of a process that has imported little.
_HELP = """
import os, runpy, sys
from moe.programs import cli
folder, *programs = sys.argv[1:]
for program in programs:
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, program
        continue
    path, *command = program.split()
    sys.argv, sys.stdout = [path, *command, "--help"], open(os.path.join(folder, os.path.basename(program)), "w")
    try:
        runpy.run_path("moe/__main__.py" if command else path, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code
    assert "jax" not in sys.modules, "JAX was imported"
    sys.stdout.close()
    os._exit(0)
"""
_PROGRAMS = [
    "main.py",
    *(f"moe {name}" for name in commands.COMMANDS if name not in ("configs", "completion")),
    *sorted(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py")),
]


@pytest.fixture(scope="module")
def help_texts(tmp_path_factory):
    """Folder with the help of every program, at a width of 80."""
    folder = tmp_path_factory.mktemp("help")
    narrow = os.environ | {"COLUMNS": "80"}
    words = [sys.executable, "-c", _HELP, folder, *_PROGRAMS]
    shown = subprocess.run(words, cwd=ROOT, env=narrow, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    return folder


@pytest.mark.parametrize("program", _PROGRAMS)
def test_help_of_every_program_has_one_form_and_imports_nothing_heavy(program, help_texts):
    """A program that ran would import JAX."""
    text = (help_texts / Path(program).name).read_text()
    _, _, options = text.partition("\noptions\n")
    examples, _, codes = options.partition("\nexit codes")
    commands = [line for line in examples.partition("\nexamples\n")[2].splitlines() if re.match(r"  \w", line)]
    assert len(commands) >= 2
    assert "130" in codes
    assert [line for line in text.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("command", ["configs", "completion"])
def test_help_of_commands_without_flags_has_the_same_form(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moe", command, "--help"])
    commands.main()
    shown = capsys.readouterr().out
    places = [shown.index(f"\n\n{heading}\n") for heading in ("needed", "examples", "exit codes")]
    assert places == sorted(places)


def test_an_example_is_broken_between_words_and_can_be_copied():
    line = 'moe generate --workdir=/tmp/run --prompt="once upon a time there was" --tokens=64  # words'
    shown = help_text.without_flags("", (), (line, "moe x"))
    lines = shown.partition("examples\n")[2].partition("\n\n")[0].splitlines()
    assert lines[0] == "  # words"
    assert shlex.split(" ".join(each.rstrip("\\") for each in lines[1:-1])) == shlex.split(line, comments=True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--confg=mixtral",), "--confg: no such option; did you mean --config?"),
        (("--lr=1", "--workdir=x"), "--lr: no such option; did you mean --config.optimizer.learning_rate?"),
        (("--config=mixtral",), "--workdir is needed, as in moe train --config=quickstart"),
        ((), "--config and --workdir are needed"),
        (("--config.mesh.data", "-1", "--nochange", "--workdir", "x", "--allow_module=a"), ""),
    ],
)
def test_names_of_options_are_checked_before_anything_else(words, says, monkeypatch):
    own = flags.FlagValues()
    for name in NEEDED:
        flags.DEFINE_string(name, None, "", flag_values=own)
    flags.DEFINE_bool("change", False, "", flag_values=own)
    flags.DEFINE_list("allow_module", [], "", flag_values=own)
    monkeypatch.setattr(flags, "FLAGS", own)
    problem = cli._problem(["main.py", *words], NEEDED, ("moe train --config=quickstart --workdir=/tmp/quickstart",))
    assert problem.startswith(says)
    assert bool(problem) == bool(says)


def test_a_short_trial_has_a_shorter_warm_up(capsys):
    """A warm-up of 20 steps, or the default's 30, becomes a tenth of ten steps, 1; not where the command line sets it,
    nor in long runs."""
    name, steps = "optimizer.warmup_steps", "train.num_steps"
    for file, warm_up in (({name: 20}, 20), ({}, 30)):
        assert cli._shorter_warm_up(file, {steps: 10}) == {name: 1}
        assert f"optimizer.warmup_steps=1 instead of the config's {warm_up}" in capsys.readouterr().err
    for file, own in (({name: 20}, {steps: 10, name: 4}), ({name: 20}, {steps: 30}), ({}, {steps: 31})):
        assert cli._shorter_warm_up(file, own) == {}
    assert capsys.readouterr().err == ""


def test_tab_completes_commands_configs_and_options(tmp_path):
    script = subprocess.run(
        [sys.executable, "-m", "moe", "completion", "bash"], cwd=ROOT, capture_output=True, text=True
    )
    assert "\ncomplete -o nospace -F _moe moe moe-ablate moe-advise " in script.stdout
    (tmp_path / "moe").write_text(f'#!/bin/sh\nexec {sys.executable} -m moe "$@"\n')
    (tmp_path / "moe").chmod(0o755)
    cases = (
        ("moe tr", 1),
        ("moe train --config = mixtral_8x", 4),
        ("moe train --work", 2),
        ("moe-plan --topo", 1),
    )
    lines = [f'COMP_WORDS=({words}); COMP_CWORD={place}; _moe; echo "${{COMPREPLY[@]}}"' for words, place in cases]
    found = subprocess.run(
        ["bash", "-c", "\n".join([script.stdout, *lines])],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert found.stdout.splitlines() == ["train translate", "mixtral_8x22b mixtral_8x7b", "--workdir=", "--topology="]
