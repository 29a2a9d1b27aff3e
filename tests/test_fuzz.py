"""Configs at random: each trains two steps with a finite loss, or ends in one sentence with nothing left behind.

``python -m pytest -n 0 -m slow tests/test_fuzz.py tests/test_fuzz_files.py`` runs all cases in one process, so that
equal programs are compiled once.
"""

from __future__ import annotations

import dataclasses
import os
import random
from typing import Any

import jax
import pytest

from moe.config import to_dict
from moe.config.registry import LAYERS
from moe.configs import base
from tests import fuzz_values
from tests.fuzz_helpers import set_field, steps_or_sentence, trains_or_refuses
from tests.run_helpers import ONE, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

PAIRS = 160
PROGRAM = ("model.", "mesh.", "optimizer.")  # sections whose values change the program
SETTINGS = {
    "train.num_steps": 2,
    "train.log_every": 1,
    "train.eval_every": 2,
    "train.sample_tokens": 0,
    "train.batch_size": 4,
    "train.writers": (),
    "optimizer.warmup_steps": 1,
    "data.heldout_rows": 2,
    "model.moe.num_experts": 4,
}


@pytest.fixture(scope="module")
def tree(directory) -> dict[str, Any]:
    """Config of a tiny run as a dict of JSON types; fields that its MoE section omits are the gate's constants."""
    config = to_dict(tiny(directory, base.get_config(), **SETTINGS))
    config["model"]["moe"] = {"num_experts": 4, "d_ff": 16}
    return config


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder that is both the current folder and the home directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    return tmp_path


def _name(case: tuple[str, Any]) -> str:
    return f"{case[0]}={ascii(case[1])[:30]}"


@pytest.mark.parametrize("case", fuzz_values.edge_cases(), ids=_name)
def test_every_field_at_its_edges(case, tree, elsewhere):
    name, value = case
    if name.startswith("model.moe."):
        tree = set_field(tree, "model.moe.dispatch", "einsum")  # compiles fastest
    elif name.startswith(PROGRAM):
        tree = set_field(tree, "model.moe.gate", "none")
    devices = ONE
    if name.startswith("mesh."):  # the data axis takes the devices that the other axes leave
        devices, tree = jax.devices(), set_field(set_field(tree, "mesh.data", -1), "train.batch_size", 8)
    changed = set_field(tree, name, value)
    if name.startswith(PROGRAM):
        steps_or_sentence(changed, devices)
    else:
        trains_or_refuses(changed, elsewhere, devices)


def random_changes(seed: int) -> tuple[dict[str, Any], int]:
    """Three to seven fields with values, and a number of devices."""
    draw = random.Random(seed)
    names = draw.sample(sorted(fuzz_values.PLAUSIBLE), draw.randint(2, 6))
    changes = {name: draw.choice(fuzz_values.PLAUSIBLE[name]) for name in names}
    gate = draw.choice(["none", *LAYERS])
    own = {field.name for field in dataclasses.fields(LAYERS[gate].gate)} if gate != "none" else set()
    drawn = draw.sample(sorted(fuzz_values.GATE_FIELDS), draw.randint(0, 3))
    chosen = {name: draw.choice(fuzz_values.GATE_FIELDS[name]) for name in drawn if name in own or draw.random() < 0.1}
    changes["model.moe.gate"] = {"name": gate, **chosen}
    if draw.random() < 0.9:  # rules that look ahead are refused otherwise
        changes["model.moe.accept_future_leak"] = True
    if gate == "soft_moe" and draw.random() < 0.9:
        changes["model.moe.dispatch"] = "einsum"
    if changes.get("model.q_lora_rank") or changes.get("model.value_dim"):  # refused without the rest of a latent
        latent = {"kv_lora_rank": 4, "value_dim": 6, "rope_dim": 2, "num_heads": 2, "num_kv_heads": 2}
        changes |= {f"model.{name}": value for name, value in latent.items()}
    return changes, draw.choice([1, 1, 2, 4])


@pytest.mark.parametrize("seed", range(PAIRS))
def test_fields_together(seed, tree, elsewhere):
    changes, devices = random_changes(seed)
    print(changes, devices)  # shown where the case fails
    for name, value in changes.items():
        tree = set_field(tree, name, value)
    if seed % 4:
        steps_or_sentence(tree, jax.devices()[:devices])
    else:
        trains_or_refuses(tree, elsewhere, jax.devices()[:devices])


def test_there_are_enough_cases():
    assert len(fuzz_values.edge_cases()) + PAIRS >= 500
