"""The package installed in an empty environment and used from another folder, as a reader of docs/api.md would.

``python -m pytest -n 0 -m network tests/test_installed.py`` (some minutes; uv, if installed, makes the environment
faster). The layer by itself, in a user's NNX and Linen models and mesh; a user's gate through every program; every
program of the README in a clean clone.
"""

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(3600)]

LAYER = """
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx import bridge
from jax.sharding import AxisType

from moe import ConfigError, MoELayer, mesh_roles

SIZES = {"d_model": 16, "d_ff": 32, "num_experts": 8}
x = jax.random.normal(jax.random.key(0), (8, 12, 16))

# Alone.
layer = MoELayer(**SIZES, rngs=nnx.Rngs(0))
y, report, routing = layer(x)
assert y.shape == x.shape and report.expert_load.shape == (8,), report


# In a user's NNX model.
class Mine(nnx.Module):
    def __init__(self, rngs):
        self.inner, self.out = MoELayer(**SIZES, gate="switch", rngs=rngs), nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        y, report, _ = self.inner(x)
        return self.out(x + y), report


@nnx.jit
def loss(model, x):
    logits, report = model(x)
    return jnp.mean(logits**2) + 0.01 * report.load_balancing_loss


gradients = nnx.grad(loss)(Mine(nnx.Rngs(1)), x)
assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradients["inner"]["router"]))


# In a user's Linen model.
class Old(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        y, report, _ = bridge.to_linen(MoELayer, **SIZES)(x)
        return flax.linen.Dense(4)(x + y)


old = Old()
variables = old.init(jax.random.key(0), x)
slopes = jax.grad(lambda variables: jnp.mean(old.apply(variables, x) ** 2))(variables)
assert any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(slopes))

# In a user's mesh whose axes have other names: values and gradients are those without a mesh.
graphdef, state = nnx.split(layer)


def both(state, x):
    def energy(state):
        y = nnx.merge(graphdef, state)(x)[0]
        return jnp.sum(y**2), y

    return jax.value_and_grad(energy, has_aux=True)(state)


expected = jax.jit(both)(state, x)
mesh = jax.make_mesh((2, 4), ("batch", "ep"), axis_types=(AxisType.Auto,) * 2)
with jax.set_mesh(mesh), mesh_roles({"data": "batch", "expert": "ep"}):
    found = jax.jit(both)(state, x)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), expected, found)
try:
    MoELayer(d_model=16, d_ff=32, num_experts=8, gate="mixtrall", rngs=nnx.Rngs(0))
except ConfigError as error:
    assert "did you mean" in str(error)
print("layer: alone, NNX, Linen, mesh")
"""
GATE = '''
import dataclasses

import jax

from moe import Gate, GateOutput
from moe.routing.interface import top_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cold(Gate):
    """The K experts of the lowest logits, weighted by a softmax of their negatives."""

    k: int = 2

    def route(self, router_logits, inputs):
        values, index = top_k(-router_logits, self.k)
        return GateOutput(index, jax.nn.softmax(values, axis=-1))
'''
CONFIG = """
from moe.config import Changes


def get_config():
    config = Changes()
    config.model.update(vocab_size=400, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=16)
    config.model.moe.update(gate="my_gates:Cold", num_experts=4, d_ff=16)
    config.data.update(dataset="./text", directory="./cache", sequence_length=32, heldout_rows=4, shuffle_window=8)
    config.train.update(num_steps=4, batch_size=4, log_every=2, eval_every=4, save_every=2, sample_tokens=4)
    config.optimizer.warmup_steps = 1
    return config
"""
SUITE = """
from moe.lab.suite import Comparison, Suite, Variant
from my_config import get_config


def get_suite(size):
    arms = {"cold": Variant({}), "mixtral": Variant({"model.moe.gate": "mixtral"})}
    compared = {"gates": Comparison("mixtral", ("cold",), ("steps", "flops", "total_parameters"))}
    return Suite("mine", "cold or hot?", get_config(), arms, (0, 1), compared, horizons=(4,), heldout_rows=4)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built by way of the source distribution if uv is there."""
    folder, uv = tmp_path_factory.mktemp("dist"), shutil.which("uv")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT]
    subprocess.run([uv, "build", "-q", "-o", folder, ROOT] if uv else pip, check=True)
    return next(folder.glob("*.whl"))


def environment_of(folder, wheel, extra=""):
    """`.venv` in the folder, with the wheel; the folder of its programs."""
    python = folder / ".venv" / "bin" / "python"
    uv = shutil.which("uv")
    make = [uv, "venv", "-p", sys.executable] if uv else [sys.executable, "-m", "venv"]
    subprocess.run([*make, folder / ".venv"], check=True)
    installer = [uv, "pip", "install", "-p", python] if uv else [python, "-m", "pip", "install", "-q"]
    subprocess.run([*installer, f"{wheel}{extra}", "-c", ROOT / "constraints.txt"], check=True)
    return python.parent


def test_the_wheel_alone_runs_the_commands_of_the_readme_from_an_empty_folder(wheel, tmp_path):
    assert wheel.stat().st_size <= 20e6
    programs = environment_of(tmp_path, wheel, "[tpu]")
    empty = tmp_path / "empty"
    empty.mkdir()
    small = "--config.model.num_layers=2 --config.model.d_model=512 --config.model.moe.d_ff=512 --config.model.d_ff=512"
    lines = {
        "train --config=tiny --workdir=run": "unigram loss",
        f"train --config=mixtral_8x7b:v5p-999 --workdir=large {small}": "whose plans are kept",
        "ablate --suite=switch_vs_mixtral --report": "report.md",
        "plan --config=mixtral_8x7b --topology=v5p-128": "A kept plan, read and not made",
        "plan --config=tiny --topology=v5p:2x2x1": "tokens/s",
        "advise --chip_hours=10000 --topology=v5p-128": "Seeds that detect a gain of 1 %",
        "conform": "conforms",
        "playground --output=page.html": "page.html",
        "configs": "mixtral_8x7b",
    }
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS")}
    for line, says in lines.items():
        result = subprocess.run(
            [programs / "moe", *line.split()],
            cwd=empty,
            env=environment | {"HOME": str(empty)},
            capture_output=True,
            text=True,
        )
        assert says in result.stdout + result.stderr, f"moe {line}: {result.stderr[-3000:]}"
        assert "Traceback" not in result.stderr, line
    assert len((empty / "switch_vs_mixtral" / "report.md").read_text()) > 10_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory, wheel):
    """An empty folder with the user's files, and `.venv` with the package."""
    folder = tmp_path_factory.mktemp("elsewhere")
    environment_of(folder, wheel)
    for name, text in (("layer.py", LAYER), ("my_gates.py", GATE), ("my_config.py", CONFIG), ("my_suite.py", SUITE)):
        (folder / name).write_text(text)
    write_text(folder)
    return folder


def write_text(folder):
    """A folder `text` of made-up words."""
    (folder / "text").mkdir()
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubdklmnrst", k=draw.randint(2, 7))) for _ in range(300)]
    lines = [" ".join(draw.choices(words, k=40)) for _ in range(400)]
    (folder / "text" / "a.txt").write_text("\n\n".join(lines))


def run(folder, *command, says, **variables):
    """Run a command in the folder, with nothing of this process's environment that names the repository."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS")}
    result = subprocess.run(
        [folder / ".venv" / "bin" / "python", *command],
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert says in result.stdout + result.stderr
    return result.stdout


def test_the_layer_in_a_users_models_and_mesh(folder):
    flags = "--xla_force_host_platform_device_count=8"
    run(folder, "layer.py", says="layer: alone, NNX, Linen, mesh", XLA_FLAGS=flags)


def test_a_users_gate_through_every_program(folder):
    main = (ROOT / "main.py", "--config=my_config.py", "--workdir=run")
    run(folder, *main, says="unigram loss")
    assert '"my_gates:Cold"' in (folder / "run" / "config.json").read_text()
    run(folder, *main, "--change", "--config.train.num_steps=6", says="resuming run at step 4 of 6")
    moe, trusted = ("-m", "moe"), "--allow_module=my_gates"
    run(folder, *moe, "generate", "--workdir=run", "--prompt=the red", "--tokens=4", trusted, says="the red")
    run(folder, *moe, "evaluate", "--workdir=run", trusted, says="perplexity")
    short = ("--tokens=128", "--shuffles=5")
    run(folder, *moe, "analyze", "--workdir=run", *short, trusted, says="experts.html")
    run(folder, *moe, "ablate", "--suite=my_suite.py", "--workdir=suite", says="report.md")
    report = (folder / "suite" / "mine" / "report.md").read_text()
    assert "cold" in report
    assert "mixtral" in report


def test_a_missing_gate_module_is_refused_in_one_sentence(folder):
    (folder / "away").mkdir()
    result = subprocess.run(
        [
            folder / ".venv" / "bin" / "python",
            "-m",
            "moe",
            "evaluate",
            "--workdir=../run",
            "--allow_module=my_gates",
        ],
        cwd=folder / "away",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "no module 'my_gates' on PYTHONPATH" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


#: Program of the table of docs/commands.md → arguments of a short run, and text that it prints.
TINY = "--config=tiny --config.data.dataset=./text --config.data.directory=cache"
SHORT_RUNS = {
    "moe configs": ("", "mixtral_8x7b"),
    "moe train": (f"{TINY} --workdir=run", "unigram loss"),
    "moe evaluate": ("--workdir=run", "perplexity"),
    "moe generate": ("--workdir=run --prompt=one --tokens=4", "one"),
    "moe downstream": ("--workdir=run --tasks=piqa", "needs the package lm_eval"),
    "moe average": ("--workdir=run --out=average", "average"),
    "moe export": ("--workdir=run --out=hf", "config.json"),
    "moe import": ("--source=hf --out=imported", "parameters"),
    "moe translate": ("--workdir=run", "needs sacrebleu"),
    "moe ablate": (
        "--suite=capacity_factor --workdir=suite --report",
        "no run of the suite is finished",
    ),
    "moe analyze": ("--workdir=run --tokens=128 --shuffles=5", "experts.html"),
    "moe overlap": (TINY, "held-out documents"),
    "moe advise": ("--tokens=1e11", "Seeds that detect a gain of 1 %"),
    "moe plan": ("--config=tiny --topology=v5p:2x2x1", "v5p"),
    "scripts/scaling.py": ("--help", "--modes"),
    "scripts/calibration.py": ("--help", "--only"),
    "scripts/gpu_report.py": ("--dry --calls=1", "DRY RUN"),
    "scripts/bench_moe.py": ("--shapes=A --tokens=64 --d_model=32 --modes=gather --repeats=1", "gather"),
    "scripts/mfu.py": (f"{TINY} --steps=3", "MFU"),
    "moe conform": ("--layer=nowhere:layer", "no module 'nowhere'"),
    "moe surgery": ("--workdir=nowhere --out=new --split=2", "nowhere/config.json"),
    "moe playground": ("--output=page.html", "page.html"),
    "moe diff": ("--workdir=nowhere", "nowhere/config.json"),
    "scripts/conformance.py": ("--help", "--layers"),
    "scripts/count_params.py": ("", "mixtral_8x7b"),
    "scripts/policy_toy.py": ("--help", "--router_noise"),
    "scripts/kill_runs.py": ("--kills=1 --per_life=1", "1 of 1 kills survived"),
    "scripts/save_cost.py": (f"{TINY} --window=2 --pairs=6", "of throughput by wall time"),
}


def _words(clone, program):
    """Beginning of the command line of a program in the clone."""
    programs = clone / ".venv" / "bin"
    command = program.removeprefix("moe ")
    return [programs / "moe", command] if command != program else [programs / "python", clone / program]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clean clone whose .venv was made by scripts/install.sh, with no module outside `moe` on its import path."""
    clone = tmp_path_factory.mktemp("clone") / "repository"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run(["sh", clone / "scripts" / "install.sh"], env=environment, check=True)
    return clone


def test_every_program_of_the_table_in_a_clean_clone(clone):
    rows = [line for line in (ROOT / "docs" / "commands.md").read_text().splitlines() if line.startswith("| `")]
    programs = {name for row in rows for name in re.findall(r"`(moe \w+|scripts/\w+\.py)`", row.split("|")[1])}
    assert programs == {*SHORT_RUNS}
    elsewhere = clone.parent / "elsewhere"
    elsewhere.mkdir()
    write_text(elsewhere)
    hidden = ("PYTHONPATH", "XLA_FLAGS", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | {"HOME": str(elsewhere)}
    for program, (arguments, says) in SHORT_RUNS.items():
        result = subprocess.run(
            [*_words(clone, program), *arguments.split()],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert says in result.stdout + result.stderr, f"{program}: {result.stderr[-3000:]}"
        assert "Traceback" not in result.stderr, program
