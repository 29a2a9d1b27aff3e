"""The suite of other libraries' blocks: cases, verdicts and the scoreboard, on a library that is made of the oracle."""

import ast
import dataclasses
import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe.config import ConfigError
from moe.conformance.judge import equations
from moe.conformance.judge.rule import Layer, Rule, Variant
from moe.conformance.peers import cases, environments, reproduction, scoreboard, suite

CLAIMS = {
    "rule": {"renormalise": True},
    "bias": False,
    "biases": False,
    "k": 2,
    "documented": {},
    "source": "",
    "read": "",
    "skip": {},
    "gradients": {"grad_router": "block.gate.weight.grad.mT"},
    "run": "block(x)",
    "has_balance": False,
    "has_z": False,
}
#: Block → (claims, how it really computes).
BLOCKS = {
    "right": (CLAIMS, Variant()),
    "documents it": (
        CLAIMS | {"documented": {"weighs_input": True}, "source": "its manual"},
        Variant(weighs_input=True),
    ),
    "detaches": (CLAIMS, Variant(router_gradient="none")),
    "fails": (CLAIMS | {"read": "its own fault"}, None),
}
TESTED = tuple(case for case in cases.CASES if case.name in ("main", "precision"))


class OracleLibrary:
    """An environment whose worker computes with the oracle."""

    name, worker = "oracle", "none.py"

    def run(self, program: Path, *arguments: str) -> str:
        if program.name == "scripts.py":
            words = {True: "a warning\nValueError: of a block", False: "largest difference 0.5 of 2.0"}
            return "".join(f"{script}\n{words['.fails.' in script]}\n" for script in arguments)
        (argument,) = arguments
        if argument == "--list":
            return json.dumps({"version": "oracle 1", "blocks": {name: claims for name, (claims, _) in BLOCKS.items()}})
        for job in json.loads(Path(argument).read_text()):
            claims, variant = BLOCKS[job["block"]]
            Path(job["out"] + ".code").write_text("block = None")
            Path(job["out"] + ".json").write_text('"{}"')
            if variant is None:
                Path(job["out"] + ".txt").write_text("ValueError: of a block\n\nTraceback")
                continue
            if job["dtype"] == "bfloat16":
                variant = dataclasses.replace(
                    variant, router_dtype="bfloat16" if job["block"] == "right" else "float32"
                )
            with np.load(job["arrays"]) as archive:
                arrays = {name: array.astype(np.float64) for name, array in archive.items()}
            layer = Layer(**(arrays | {"mask": arrays["mask"].astype(bool), "logits": None}))
            rule = Rule(**claims["rule"], k=job["k"])
            if job["forward_only"]:  # the case of choices alone
                found = vars(equations.decide(rule, variant, layer))
            else:
                found = equations.compute(rule, variant, layer)
            results = {name: value for name, value in found.items() if name.startswith(("grad", "y", "expert_index"))}
            np.savez(job["out"] + ".npz", **results, **{"state.gate.weight": layer.router.T})
        return ""


def test_verdicts_and_page(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "CASES", TESTED)
    library = suite.describe(OracleLibrary())
    stale = tmp_path / "oracle" / "results" / "another run.npz"
    stale.parent.mkdir(parents=True)
    stale.touch()
    suite.measure(OracleLibrary(), library, tmp_path / "oracle")
    assert not stale.exists()
    cells = {(cell.block, cell.column): cell for cell in suite.judge(library, tmp_path / "oracle")}
    assert {cells["right", column].status for column in ("choice", "output", "grad router", "grad experts")} == {
        "equal"
    }
    assert cells["right", "weights"].status == "not applicable"
    assert cells["documents it", "output"].status == "documented"
    assert cells["documents it", "choice"].status == "equal"
    assert cells["detaches", "output"].status == "equal"
    assert cells["detaches", "grad router"].status == "deviates"
    assert "pass no gradient to the router" in cells["detaches", "grad router"].text
    # Twins are one bfloat16 step apart, so that a bfloat16 product cannot tell them apart.
    assert cells["right", "router product"].status == "bfloat16"
    assert cells["detaches", "router product"].status == "equal"
    failing = [cell for cell in cells.values() if cell.block == "fails"]
    assert {cell.status for cell in failing} == {"raises"}
    assert {cell.text for cell in failing} == {"ValueError: of a block: its own fault"}
    reproduction.write_all(tmp_path, library, list(cells.values()))
    reproduced = reproduction.run(tmp_path, OracleLibrary(), list(cells.values()))
    errors = {f"fails, {cell.column}": math.inf for cell in failing}
    assert reproduced == {"detaches, grad tokens": 0.25, "detaches, grad router": 0.25} | errors
    order, taken = ["oracle", "another"], {"seconds": 61.4, "reproduced": reproduced}
    scoreboard.write(tmp_path, library, list(cells.values()), "conform.py", order, **taken)
    page = (tmp_path / "scoreboard.md").read_text()
    assert "4 blocks of 1 library," in page
    assert "| oracle 1 | 4 |" in page
    assert "| library | blocks | routing | output |" in page
    assert ", 61 s; `conform.py`" in page
    assert "## Not checked, and why" in page
    assert "- detaches (grad tokens, grad router, up to" in page
    assert "9 of 9 cells that deviate or raise an error are reproduced by their script alone" in page
    assert "deviations by 0.25 or more." in page
    script = (tmp_path / "reproduce" / "oracle.detaches.grad_router.py").read_text()
    assert "block.gate.weight.grad.mT" in script
    assert len(script.splitlines()) <= 20
    script = (tmp_path / "reproduce" / "oracle.fails.output.py").read_text()
    assert "fails of oracle, output: raises an error." in script
    assert "load_state_dict" not in script


def test_a_script_that_shows_nothing_reproduces_nothing():
    """NaN: another error than the cell's, an error instead of a difference, no output."""
    failed = suite.Cell("oracle", "fails", "output", "raises", "ValueError: of a block: its own fault")
    deviating = suite.Cell("oracle", "detaches", "output", "deviates")
    for cell, text in ((failed, "TypeError: of a block"), (failed, "ValueError: 1"), (failed, ""), (deviating, "")):
        assert math.isnan(reproduction._printed(cell, text))
    assert reproduction.sentence({"a": math.nan, "b": 0.5, "c": math.inf}).startswith("2 of 3 cells")


@pytest.mark.parametrize("worker", ["easydel_blocks", "maxtext_blocks"])
def test_scripts_in_jax_are_short(worker, monkeypatch):
    """20 lines of 120 columns at most, for every quantity of every block on one device."""
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # a worker sets it
    monkeypatch.syspath_prepend(str(suite.WORKERS))
    blocks = {
        name: block for name, block in importlib.import_module(worker).ADAPTERS.items() if "4 devices" not in name
    }
    assert blocks
    for name, block in blocks.items():
        claims = block.claims()
        layer = suite.layer_of_claims(claims, cases.CASES[0])
        for quantity, expression in reproduction._in_jax(claims, layer).items():
            script = reproduction.script(f"{name}: {quantity}", reproduction._jax_text(block.code(2), expression))
            compile(script, name, "exec")
            lines = script.splitlines()
            assert len(lines) <= 20, (name, quantity, len(lines))
            assert max(map(len, lines)) <= 120, (name, quantity, max(lines, key=len))


@pytest.mark.transformers
@pytest.mark.parametrize("worker", ["transformers_blocks", "control_blocks", "parallel_blocks"])
def test_scripts_in_pytorch_are_short(worker, monkeypatch):
    """20 lines at most, for every quantity of every case of every block, on one process and several."""
    monkeypatch.syspath_prepend(str(suite.WORKERS))
    module, jobs = importlib.import_module(worker), importlib.import_module("jobs")
    blocks = module.adapters() if worker == "transformers_blocks" else module.ADAPTERS
    for name, block in (blocks | getattr(module, "CONTROLS", {})).items():
        claims = block.claims()
        for case in cases.CASES:
            if suite.reason_to_skip(claims, case):
                continue
            code = jobs.lines(block, {"k": case.k or block.k, "balance": case.balance, "z": case.z})
            for quantity, expression in reproduction._in_torch(claims, case).items():
                text = reproduction._torch_text(code, expression, claims, case, reproduction._LOAD)
                script = reproduction.script(f"{name}: {quantity}", text)
                compile(script, name, "exec")
                assert len(script.splitlines()) <= 20, (name, case.name, quantity)


def test_scripts_run_apart(tmp_path):
    """A script that changes a module, and one that raises, leave the next one as it is."""
    texts = {"one": "import math\nmath.pi = 3\nprint(math.pi)", "two": "1 / 0", "three": "import math\nprint(math.pi)"}
    paths = [str(tmp_path / f"{name}.py") for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        Path(path).write_text(text)
    command = [sys.executable, str(suite.WORKERS / "scripts.py"), *paths]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed == [paths[0], "3", paths[1], "ZeroDivisionError: division by zero", paths[2], str(math.pi)]


def test_cases_show_what_they_say():
    """By the oracle: an expert without tokens, equal experts, biased scores below 0."""
    rule = Rule(k=2, score="sigmoid", renormalise=True)
    by_name = {case.name: case for case in cases.CASES}
    made = {name: cases.layer_of(case, rule, bias=True, biases=False) for name, case in by_name.items()}
    chosen = {name: equations.decide(rule, Variant(), layer).expert_index for name, layer in made.items()}
    assert 3 not in chosen["empty"]
    assert set(chosen["main"].ravel()) == set(range(cases.NUM_EXPERTS))
    np.testing.assert_array_equal(chosen["negative"], chosen["main"])
    assert (1 + made["negative"].bias < 0).all()
    logits = made["ties"].router_logits(Variant())
    np.testing.assert_array_equal(logits[..., 2], logits[..., 5])


def test_pins_are_exact():
    for environment in environments.read(Path("nowhere")).values():
        assert (suite.WORKERS / environment.worker).is_file()
        assert all("==" in package for package in environment.packages), environment.name
        assert bool(environment.python and environment.packages) is not environment.here, environment.name


def test_adapters_are_short():
    """At most 40 lines: each class, function, text and entry of a table of blocks; what all libraries share aside."""
    workers = {environment.worker for environment in environments.read(Path("nowhere")).values()}
    shared_by_transformers = {"transformers_adapters.py", "transformers_models.py", "stacked_experts.py"}
    entries = 0
    for name in workers | shared_by_transformers:
        for node in ast.parse((suite.WORKERS / name).read_text()).body:
            parts = [node]
            if re.match(r"(ADAPTERS|CONTROLS)\b|def adapters\b", ast.unparse(node)):  # tables of blocks
                parts = [value for table in ast.walk(node) if isinstance(table, ast.Dict) for value in table.values]
                entries += len(parts)
            for part in parts:
                assert part.end_lineno - part.lineno < 40, (name, part.lineno)
    assert entries > 100


def test_the_summary_of_the_scoreboard_counts_its_tables():
    page = (Path(__file__).parents[2] / "docs" / "results" / "scoreboard.md").read_text()
    blocks = {}
    for section in re.findall(r"^## (?!Control|Not)[^\n]*\n\n(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL):
        header, _, *rows = _rows(section)
        blocks.setdefault(section.split()[0], []).extend(dict(zip(header, row, strict=True)) for row in rows)
    expected = {}
    for library, found in blocks.items():
        expected[library] = [str(len(found))]
        for columns in scoreboard.GROUPS.values():
            signs = [block[column].strip("*") for block in found for column in columns]
            counts = [f"{signs.count(sign)} {sign}" for sign in ("=", "doc", "≠", "bf16", "!") if sign in signs]
            expected[library].append(", ".join(counts) or "·")
    summary = page[page.index("| library | blocks | routing") :].partition("\n## ")[0]
    header, _, *rows = _rows(summary)
    assert header == ["library", "blocks", *scoreboard.GROUPS]
    assert {row[0]: row[1:] for row in rows} == expected
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    assert f"compared {sum(map(len, blocks.values()))} MoE blocks of {len(blocks)} libraries" in readme


def _rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_own_layers_need_no_environment(tmp_path):
    own = [environment for environment in environments.read(tmp_path).values() if environment.here]
    assert [environment.name for environment in own] == ["own", "own-parallel"]
    for environment in own:
        environment.make()
        assert environment.interpreter == Path(sys.executable)
        assert environment.control
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "block"), [("own", "deepseek_v3, gather"), ("own-parallel", "mixtral, dropless, expert=2")]
)
def test_own_layers_raise_no_alarm(name, block, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "CASES", TESTED)
    environment = environments.read(tmp_path)[name]
    library = suite.describe(environment)
    library = dataclasses.replace(library, blocks={block: library.blocks[block]})
    suite.measure(environment, library, tmp_path)
    cells = {cell.column: cell.status for cell in suite.judge(library, tmp_path)}
    assert set(cells) == {*suite.MAIN, "router product"}
    assert {status for column, status in cells.items() if column in suite.MAIN} == {"equal"}
    assert cells["router product"] == "not applicable"  # its config refuses K = 1


def test_missing_uv_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    with pytest.raises(ConfigError, match="needs uv"):
        next(iter(environments.read(tmp_path).values())).make()
