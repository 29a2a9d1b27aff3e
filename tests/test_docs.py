"""Code and commands of the guides, executed as written."""

import ast
import dataclasses
import importlib
import inspect
import json
import operator
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from moe.config import Config, build_layers, command_line
from moe.config.registry import LAYERS
from moe.programs import cli
from moe.routing.balancing import LayerReport
from moe.system import shipped
from moe.training import evaluation
from moe.training.metrics import Throughput, mean_row
from moe.training.progress import Progress
from moe.training.update import TrainMetrics
from tests.helpers import tiny_model
from tests.program_helpers import run_here

ROOT = Path(__file__).parents[1]
API, WALK = ROOT / "docs" / "api.md", ROOT / "docs" / "walk.md"


def test_programs_import_only_what_is_installed():
    """An installation provides only `moe`; beside main.py, and under pytest, the other folders can be imported too."""
    folders = ("scripts", "moe", "configs")
    for path in (ROOT / "main.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.partition(".")[0] not in ("configs", "scripts", "tests"), f"{path}:{node.lineno}"


def test_a_default_config_imports_its_neighbours_from_any_folder(tmp_path):
    package = tmp_path / "settings"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "common.py").write_text("from moe.config import Config, changes_of\n")
    (package / "mine.py").write_text(
        "from settings import common\n\ndef get_config():\n    return common.changes_of(common.Config(seed=5))\n"
    )
    scripts, elsewhere = tmp_path / "scripts", tmp_path / "elsewhere"
    scripts.mkdir()
    elsewhere.mkdir()
    (scripts / "program.py").write_text(
        "from pathlib import Path\nfrom moe.programs import cli\n"
        "flag = cli.define_config(Path(__file__).parents[1] / 'settings' / 'mine.py')\n"
        "cli.run(lambda: print(cli.load_config(flag).seed, cli.load_config(flag).train.num_steps))\n"
    )
    command = [sys.executable, scripts / "program.py", "--config.train.num_steps=70"]
    result = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
    assert (result.stdout.split(), result.returncode) == (["5", "70"], 0), result.stderr


def test_commands_of_configs_can_be_copied_from_the_file():
    """A shell goes on with the next line after one backslash; two, as some strings need, are an argument."""
    for path in (ROOT / "configs").rglob("*.py"):
        assert "\\\\\n" not in path.read_text(), path


def test_configs_with_kept_plans_do_not_say_that_they_were_never_compiled():
    kept = {plan["config"] for plan in json.loads((ROOT / "configs" / "plans.json").read_text())}
    assert [name for name in kept if "neither compiled" in (ROOT / "configs" / f"{name}.py").read_text()] == []


def test_guides_are_short():
    assert sum(len(page.read_text().split()) for page in (ROOT / "docs").glob("*.md")) <= 30_000
    assert len((ROOT / "README.md").read_text().split()) <= 650


def _commands() -> list[tuple[str, list[str], bool]]:
    """Every command of this package in README and guides: its page, its words, and whether it stands in a block, which
    has all that it needs, or in running text."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        blocks = "".join(re.findall(r"^ *```sh\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
        inline = re.findall(r"`(moe [a-z]+ --[^`]*|python \w[\w/]*\.py --[^`]*)`", text)
        parts = [part for line in blocks.splitlines() for part in line.replace(".venv/bin/", "").split(" && ")]
        for line, complete in (*((part, True) for part in parts), *((line, False) for line in inline)):
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # environment variables
                words = words[1:]
            if words[:1] in (["moe"], ["python"]) and words[1] not in ("-c", "-m"):
                words = ["train" if word == "main.py" else word for word in words[1:]]
                found.append((page.name, words, complete))
    return found


_CHECK = """
import importlib, json, runpy, sys
from absl import flags
from moe.programs import cli, commands

def check(main, required=(), examples=()):
    if problem := cli._problem(sys.argv, required if complete else (), ()):
        print(f"{page}: {' '.join(sys.argv)}: {problem}")

cli.run = check
shared = {*flags.FLAGS}
for program, given in json.load(sys.stdin).items():
    if program in commands.COMMANDS:
        run = importlib.import_module(f"moe.programs.{commands.COMMANDS[program][0]}").run
    else:
        runpy.run_path(program)  # defines its flags, and does not start
        run = lambda: check(None)
    for page, words, complete in given:
        sys.argv = ["moe", *words[1:]]
        run()
    for name in {*flags.FLAGS} - shared:
        delattr(flags.FLAGS, name)
assert "jax" not in sys.modules
"""


def test_commands_of_the_guides_have_options_that_exist():
    by_program = {}
    for page, words, complete in _commands():
        by_program.setdefault(words[0], []).append((page, words, complete))
    assert len(by_program) > 15
    assert sum(map(len, by_program.values())) > 100
    checked = subprocess.run(
        [sys.executable, "-c", _CHECK], cwd=ROOT, input=json.dumps(by_program), capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout) == (0, ""), checked.stderr


def test_configs_of_the_commands_of_the_guides_are_valid(monkeypatch):
    """Names of configs, and the values of settings; not the checkpoint that a run starts from."""
    monkeypatch.chdir(ROOT)
    seen = set()
    for page, words, _ in _commands():
        others, texts = command_line.split(words)
        names = [word.partition("=")[2] for word in others if word.startswith("--config=")]
        if names and not names[0].endswith(".json"):
            start = texts.pop("start.checkpoint", [])
            if "my_" not in str(texts):  # files of the reader
                checkpoint, file, own = command_line.layers(shipped.find(names[0]), texts)
                if start:
                    own["start.checkpoint"] = start[-1]
                build_layers(checkpoint, file, own, cli._shorter_warm_up(file, own))
                seen.add(page)
    assert len(seen) > 10


def test_the_readme_counts_the_layers():
    assert f"Switch, GShard, Mixtral and {len(LAYERS) - 3} others" in (ROOT / "README.md").read_text()


def test_continuous_integration_runs_the_two_lines_of_the_start():
    """One line trains on a fresh machine, one tests: the README's Start has no other commands."""
    start = (ROOT / "README.md").read_text().partition("## Start\n\n")[2].partition("\n## ")[0]
    assert start.startswith("In a clone of this repository")
    train, test = (block.strip() for block in re.findall(r"```sh\n(.*?)```", start, re.DOTALL))
    assert train.startswith("sh scripts/install.sh && .venv/bin/moe train --config=quickstart ")
    assert test.startswith("sh scripts/install.sh dev && ")
    checks = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in checks
    assert test in [line.strip() for line in checks.splitlines()]
    assert f"- run: {train}\n" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_the_answer_on_the_first_page_is_short_and_begins_with_what_was_registered():
    answer = (ROOT / "README.md").read_text().partition("## Switch or Mixtral?")[2].partition("\n## ")[0]
    assert len(re.sub(r"<!--.*?-->|!?\[[^]]*\]\([^)]*\)", "", answer, flags=re.DOTALL).split()) <= 120
    assert re.findall(r"claim [\d.]+", answer) == ["claim 52", "claim 53", "claim 26", "claim 42.2"]


def test_the_install_script_names_what_a_machine_lacks(tmp_path):
    """Without any Python 3.12, and where pip fails: one sentence and exit code 1."""
    for name in ("dirname", "awk", "rm", "touch"):
        (tmp_path / name).symlink_to(shutil.which(name))
    for name in ("python3", "python3.12", "python3.13", "python3.14"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    folder = tmp_path / "clone" / "scripts"
    folder.mkdir(parents=True)
    script = (ROOT / "scripts" / "install.sh").read_text()
    (folder / "install.sh").write_text(script.replace("/usr/bin/python3", "/nowhere/python3"))
    command = ["/bin/sh", folder / "install.sh"]
    without = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (without.returncode, without.stderr.count("\n")) == (1, 1), without.stderr
    assert "no Python 3.12 or newer found" in without.stderr
    # An interpreter that is new enough, and whose pip fails.
    fails = '#!/bin/sh\ncase "$*" in *pip*) exit 1;; --version) echo Python 3.13;; esac\n'
    (tmp_path / "python3.13").write_text(fails)
    (tmp_path / "clone" / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "clone" / ".venv" / "bin" / "python").write_text(fails)
    (tmp_path / "clone" / ".venv" / "bin" / "python").chmod(0o755)
    failing = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert failing.returncode == 1, failing.stderr
    assert failing.stderr.splitlines()[-1].startswith("install: pip failed, see above.")


def test_the_first_page_says_where_to_go_in_twelve_rows():
    wishes = (ROOT / "docs" / "index.md").read_text().partition("## I want to")[2].partition("```")[0]
    assert 0 < len(re.findall(r"^\| \w", wishes, re.MULTILINE)) <= 12


def test_the_tour_names_what_exists():
    """Each row links a function to the file that defines it."""
    stops = re.findall(r"^\| \[`([\w.]+)`\]\(\.\./([\w/]+)\.py\) \|", (ROOT / "docs" / "tour.md").read_text(), re.M)
    assert len(stops) >= 25
    for name, module in stops:
        function = operator.attrgetter(name)(importlib.import_module(module.replace("/", ".")))
        assert inspect.unwrap(function).__module__ == module.replace("/", "."), name


def _links(page: Path) -> set[Path]:
    """Pages that a page links to, and those in its tables of contents."""
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    for contents in re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL):
        links += [f"{line}.md" for line in contents.splitlines() if line and not line.startswith(":")]
    return {(page.parent / link).resolve() for link in links if link.endswith(".md")}


def test_every_page_of_the_site_is_reached_in_two_clicks():
    index = ROOT / "docs" / "index.md"
    first = _links(index)
    reached = first | {page for each in first if each.exists() for page in _links(each)}
    pages = {page.resolve() for page in (ROOT / "docs").rglob("*.md") if "reference" not in page.parts}
    assert pages - reached - {index} == set()


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_files_of_the_repository_resolve():
    """Sphinx also checks links of the site, to which README and the other top-level pages do not belong."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    assert len(links) > 200
    for page, link in links:
        path, _, anchor = link.partition("#")
        if link.startswith(("http", "mailto:")) or path.endswith(".rst"):  # Sphinx generates the reference
            continue
        target = page.parent / path if path else page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in _anchors(target), f"{page}: {link}"


def test_pictures_of_pages_are_not_stale(monkeypatch):
    ended = run_here("scripts/pictures.py", ["--check"], monkeypatch)
    assert ended.code == 0, ended.errors
    shown = {name for page in (ROOT / "docs").glob("*.md") for name in re.findall(r"\((\w+)\.png\)", page.read_text())}
    assert shown - json.loads((ROOT / "docs" / "pictures.json").read_text()).keys() == set()


def test_the_lock_has_the_tested_versions_of_all_requirements_with_hashes():
    pinned = re.compile(r"^([\w.-]+)==(\S+).*\\\n((?:    --hash=sha256:[0-9a-f]{64}.*\n?)+)", re.MULTILINE)
    locked = {name: version for name, version, _ in pinned.findall((ROOT / "requirements.lock").read_text())}
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    needed = re.findall(r"^[\w.-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert {name.lower().replace("_", "-") for name in needed} - locked.keys() == set()
    assert {name: version for name, version in locked.items() if tested.get(name, version) != version} == {}


def _messages() -> str:
    """All string literals of the package, one per line, without the values of f-strings."""
    found = []
    for path in (ROOT / "moe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(getattr(part, "value", "") for part in node.values if isinstance(part, ast.Constant))
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_entries_of_the_troubleshooting_page_are_messages():
    """Each part of a heading, split at values (..., N, M, E) and punctuation, occurs in a string of the code."""
    headings = re.findall(r"\*\*`([^`]+)`", (ROOT / "docs" / "troubleshooting.md").read_text())
    assert len(headings) > 20
    messages = re.sub(r"\s+", " ", _messages())
    for heading in headings:
        pieces = re.split(r"\.\.\.|\b[NME]\b|[;:,?()=\[\]]|\d+\.\d s", heading)
        pieces = [piece.strip() for piece in pieces if len(piece.strip()) > 3]
        assert pieces
        assert not [piece for piece in pieces if piece not in messages], heading


@pytest.mark.slow
def test_the_code_of_the_api_page_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", API.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    names = {}
    for block in blocks:
        exec(compile(block, "api.md", "exec"), names)
    assert names["y"].shape == (8, 128, 512)  # from the last block, on a mesh
    assert len(names["y"].sharding.device_set) == len(jax.devices()) == 8
    assert names["output"].logits.shape == (2, 64, 4096)
    writer = names["lines"](tmp_path, {}, 0)
    writer.write(1, "train", {"loss": 2.0})
    writer.write(1, "timing", {"mfu": 0.5})
    writer.close()
    assert (tmp_path / "loss.txt").read_text() == "1 2.0\n"


def test_guides_give_the_memory_of_mixtral_8x7b():
    """46,702,792,704 parameters and 7,241,732,096 of Mistral 7B: a state of 12 bytes each, two models in float32,
    a state beside a checkpoint in float32."""
    parameters, dense = 46_702_792_704, 7_241_732_096
    sizes = {"runs": 12 * parameters, "surgery": 2 * 4 * parameters, "finetuning": 12 * parameters + 4 * dense}
    for page, size in sizes.items():
        text = " ".join((ROOT / "docs" / f"{page}.md").read_text().split())
        assert re.findall(r"(\d+) GB for Mixtral 8x7B", text) == [f"{size / 1e9:.0f}"], page


def test_every_logged_value_is_explained():
    names = {field.name for part in (TrainMetrics, LayerReport) for field in dataclasses.fields(part)}
    names -= {"layers", "terms", "sums"}
    names |= mean_row([{"skipped": 0, "expert_load": [[1.0]], "broken_tokens": [0]}]).keys()
    names |= evaluation._summary(np.ones(3), 1.0, []).keys()
    throughput = Throughput(Config(model=tiny_model()))
    throughput._peak, throughput._datasheet = 1.0, 1.0
    names |= throughput.row(1.0, 0.0).keys()
    names |= {"train", "heldout/DOMAIN", "heldout_ema/DOMAIN", "warning"}  # kinds of rows
    page = (ROOT / "docs" / "runs.md").read_text()
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


@pytest.mark.slow
def test_the_training_loop_of_the_guide_learns():
    guide = (ROOT / "docs" / "own_gates.md").read_text().partition("## A training loop")[2]
    (block,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    names = {}
    exec(compile(block, "own_gates.md", "exec"), names)
    assert names["layers"].expert_load.shape == (2, 8)
    assert float(names["loss"]) < 3.9  # ln 64 = 4.16 is chance
    up = names["parameters"]["segment_0"]["block_0"]["moe"]["experts"]["up"][...]
    assert up.sharding.shard_shape(up.shape)[1] == 2  # 8 experts over 4 devices


def _forms_of_steps(page: str) -> list[str]:
    """Patterns of the step lines on a page: any numbers after the names of losses and speeds, any text for "...", and
    everything else literally."""
    forms = []
    for line in re.findall(r"^step .*$", page, re.MULTILINE):
        pieces = re.split(r"(\.\.\.|(?<=loss )[\d.]+|(?<=heldout )[\d.]+|(?<=tokens/s )[\d,]+|(?<=MFU )\d+)", line)
        values = [r"[\d.,]+" if re.fullmatch(r"[\d.,]*\d", piece) else re.escape(piece) for piece in pieces]
        forms.append("".join(".*" if piece == "..." else form for piece, form in zip(pieces, values, strict=True)))
    return forms


def test_step_lines_in_the_walk_match_those_that_a_run_prints(capsys):
    """A row with these values is printed as the second step line on the page, and matches no other."""
    progress = Progress(10, 20, quiet=False, epochs_per_step={"text": 0.0005})
    row = {"cross_entropy": 5.701, "learning_rate": 0.0012, "fraction_tokens_dropped": [0.0, 0.0]}
    progress.logged(row, {"tokens_per_second": 5201.2, "mfu": 0.051})
    progress.evaluated({"loss": 5.739, "standard_error": 0.043, "targets": 511})
    progress.show(20)
    line = capsys.readouterr().err.rstrip("\n")
    held = "heldout 5.739 ± 0.043 (511 tokens)"
    assert line == f"step 20/20 (100 %) loss 5.701 {held} tokens/s 5,201 dropped 0.0 % lr 0.0012 epoch 0.01 MFU 5 %"
    forms = _forms_of_steps(WALK.read_text())
    assert len(forms) == 6
    assert [bool(re.fullmatch(form, line)) for form in forms] == [False, True, False, False, False, False]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_walk(tmp_path):
    """Train, extend, change the rate, fine-tune, export, import, fine-tune the import, export: the lines that each
    prints."""
    page = WALK.read_text()
    commands = "".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)[:2])
    commands = commands.replace("/tmp/walk", str(tmp_path)).replace("\nmoe ", f"\n{sys.executable} -m moe ")
    alone = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "HOME": str(tmp_path)}
    result = subprocess.run(
        ["sh", "-ec", commands], cwd=ROOT, env=os.environ | alone, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    said = [
        line
        for line in result.stdout.splitlines()
        if re.match("resuming|changed|start:|.*: config.json|.*active", line)
    ]
    mesh = "mesh: data 1 x fsdp 1 x expert 1 x tensor 1 (cpu)"
    model, size = (
        f"model: 131,744 parameters, 94,880 active per token; {mesh}",
        "131,744 parameters, 94,880 active per token",
    )
    taken = "fresh: none; optimizer state: new; tokenizer: inherited; model: inherited"
    assert said == [
        model,
        model,
        f"resuming {tmp_path}/run at step 20 of 30",
        "changed from step 20 on: train.num_steps 20 to 30",
        model,
        f"resuming {tmp_path}/run at step 30 of 40",
        "changed from step 30 on: optimizer.learning_rate 0.003 to 0.001",
        "changed from step 30 on: optimizer.schedule 'cosine' to 'constant'",
        "changed from step 30 on: train.num_steps 30 to 40",
        f"start: 23 of 23 arrays from {tmp_path}/run; {taken}",
        model,
        f"{tmp_path}/hf: config.json, model.safetensors, tokenizer.model",
        f"{tmp_path}/imported: {size}",
        f"start: 23 of 23 arrays from {tmp_path}/imported; {taken}",
        model,
        f"{tmp_path}/hf2: config.json, model.safetensors, tokenizer.model",
    ]
    shown = iter(result.stderr.splitlines())  # each form continues where the previous one matched
    for form in _forms_of_steps(page):
        assert any(re.fullmatch(form, line) for line in shown), form
