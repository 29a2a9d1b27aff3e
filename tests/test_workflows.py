"""Random workflows, interrupted at random steps, against the same ones without interruption.

Each is train, change, fine-tune, distil, export, import, fine-tune again, and a suite, with a gate and settings drawn
from a seed; what its stages leave behind is the same to the byte. ``python -m pytest -n 0 -m slow
tests/test_workflows.py``.
"""

import contextlib
import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest

from moe.checkpoints import workdir as workdirs
from moe.config import DistillConfig, StartConfig
from moe.interop import export_checkpoint, import_checkpoint
from moe.lab import records
from moe.lab.running import runner
from moe.lab.running.programs import Programs
from moe.parallel.mesh import make_mesh
from moe.training.train import train
from tests.lab_helpers import tiny_base, tiny_suite, write_page
from tests.run_helpers import ONE, Interrupted, interrupted, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.usefixtures("compilation_cache")]
STEPS = 4


@pytest.fixture(scope="module")
def programs():
    """A make_program that compiles each program once."""
    return Programs()


class Workflow:
    """The stages of a seed in a folder; with ``stops``, each training stage is interrupted at two random steps."""

    def __init__(self, seed, folder, text, programs, *, stops):
        draw = np.random.default_rng(seed)
        self.folder, self.text, self.programs = folder, text, programs
        self.stops = np.random.default_rng(100 + seed) if stops else None
        self.settings = {
            "model.num_layers": 1,
            "model.moe.gate": "mixtral",
            "model.moe.dispatch": str(draw.choice(["dropless", "gather"])),
            "model.moe.capacity.train": 4.0,  # E / K: nothing is dropped
            "model.moe.capacity.eval": 4.0,
            "train.num_steps": STEPS,
            "train.save_every": int(draw.integers(1, 4)),
            "train.log_every": int(draw.integers(1, 4)),
            "train.sample_tokens": int(draw.choice([0, 3])),
            "optimizer.ema_decay": float(draw.choice([0.0, 0.5])),
            "seed": int(draw.integers(100)),
        }
        self.more, self.carry = int(draw.integers(1, 4)), bool(draw.integers(2))
        self.soft_share = float(draw.uniform(0.1, 0.9))
        folder.mkdir()

    def train(self, config, name, **options):
        workdir = str(self.folder / name)
        options |= {"make_program": self.programs, "quiet": True}
        for _ in range(2 if self.stops else 0):
            with interrupted(int(self.stops.integers(1, config.train.num_steps + 1))), contextlib.suppress(Interrupted):
                train(config, workdir, ONE, **options)
        train(config, workdir, ONE, **options)

    def run(self):
        config = tiny(self.text, **self.settings)
        self.train(config, "first")
        longer = dataclasses.replace(config.train, num_steps=STEPS + self.more)
        self.train(dataclasses.replace(config, train=longer), "first", allow_changes=True)
        optimizer = "carry" if self.carry else "reset"
        start = StartConfig(checkpoint=str(self.folder / "first"), optimizer=optimizer)
        self.train(dataclasses.replace(config, start=start), "tuned")
        self.train(
            dataclasses.replace(config, distill=DistillConfig(str(self.folder / "tuned"), self.soft_share)), "student"
        )
        export_checkpoint(self.folder / "student", self.folder / "exported")
        imported = import_checkpoint(self.folder / "exported", self.folder / "imported")
        again = StartConfig(checkpoint=str(self.folder / "imported"))
        self.train(dataclasses.replace(config, model=imported.model, start=again), "last")
        # On one device, like the other stages: eight fake devices on busy cores may wait for each other for ever.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "train", functools.partial(train, devices=ONE))
            patch.setattr(runner, "make_mesh", functools.partial(make_mesh, devices=ONE))
            self.suite()

    def suite(self):
        suite = tiny_suite(tiny_base(self.text))
        for _ in range(2 if self.stops else 0):
            with interrupted(int(self.stops.integers(1, STEPS + 1))), contextlib.suppress(Interrupted):
                runner.Worker(suite, self.folder / "suite", []).run()
        runner.Worker(suite, self.folder / "suite", []).run()
        write_page(self.folder / "suite", suite, records.read_all(self.folder / "suite"))

    def left(self):
        """Path → content of every file that must not depend on interruptions, without the folder's own name."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            kept = path.name in ("metrics.jsonl", "report.txt", "changes.jsonl", "config.json", "results.csv")
            if path.is_file() and (kept or "exported" in name):
                content = path.read_bytes().replace(str(self.folder).encode(), b"FOLDER")
                # The run's name in a suite has a hash of its settings, which name no folder here.
                found[name] = content
        return found


@pytest.mark.parametrize("seed", range(3))
def test_interruptions_leave_no_trace(seed, directory, programs, tmp_path):
    whole, stopped = (
        Workflow(seed, Path(tmp_path) / name, directory, programs, stops=name == "stopped")
        for name in ("whole", "stopped")
    )
    whole.run()
    stopped.run()
    expected, found = whole.left(), stopped.left()
    assert sorted(found) == sorted(expected)
    differing = [name for name in expected if found[name] != expected[name]]
    assert not differing, differing
    assert {"first/changes.jsonl", "student/report.txt", "exported/config.json", "suite/results.csv"} <= found.keys()
    assert workdirs.read_config(stopped.folder / "last").start.checkpoint == str(stopped.folder / "imported")
