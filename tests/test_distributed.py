"""Two processes of four devices each compute what one process of eight does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sys
import numpy as np
from moe import platform
if "JAX_COORDINATOR_ADDRESS" in __import__("os").environ:
    platform.join_processes()
import jax
from moe import sharding, step
from moe.config import from_config_dict
config = from_config_dict({
    "model": dict(num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64, vocab_size=64,
                  moe=dict(num_experts=4)),
    "data": dict(sequence_length=16), "train": dict(batch_size=8), "mesh": dict(data=2, fsdp=1, expert=4, tensor=1),
})
assert len(jax.devices()) == 8
mesh = sharding.make_mesh(config.mesh)
tokens = np.random.default_rng(0).integers(0, 64, (8, 17)).astype(np.int32)
mine = tokens[jax.process_index() * 8 // jax.process_count():][: 8 // jax.process_count()]
rows = dict(tokens=mine[:, :-1], targets=mine[:, 1:], segment_ids=np.ones_like(mine[:, 1:]),
            positions=np.tile(np.arange(16, dtype=np.int32), (len(mine), 1)))
with jax.set_mesh(mesh):
    program = step.build(config, mesh)
    state = program.init()
    for _ in range(3):
        state, metrics = program.train_step(state, step.place(rows, mesh))
        print("loss", float(metrics.loss), flush=True)
"""


def _start(devices, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        | environment,
    )


def _losses(process):
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    return [float(line.split()[1]) for line in output.splitlines() if line.startswith("loss")]


def test_two_processes_equal_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    pair = [
        _start(4, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(index)) for index in (0, 1)
    ]
    first, second = (_losses(process) for process in pair)
    assert len(first) == 3
    assert first == second
    assert max(abs(a - b) for a, b in zip(first, _losses(_start(8)), strict=True)) < 1e-5
