"""Model FLOPs utilisation of a config's train step: `python scripts/mfu.py [--config=FILE] [--steps=N]`.

Prints the machine's matmul rate and the step's, measured in turns in one process, on random tokens: no data needed.
`--seeds=N` also times N runs as one vmapped program, on one device: whether seeds should train together.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe import platform

if __name__ == "__main__":
    platform.use_huge_pages()

from absl import flags

from moe import cli

_CONFIG = cli.define_config("configs/quickstart.py")
_STEPS = flags.DEFINE_integer("steps", 20, "Train steps that are timed.", lower_bound=3)
_SEEDS = flags.DEFINE_integer("seeds", 1, "Runs in one vmapped program, timed too if more than one.", lower_bound=1)


def main() -> None:
    """Flags in, a few lines out."""
    config = cli.load_config(_CONFIG)
    import statistics
    import time

    import jax
    import numpy as np

    from moe import flops, sharding
    from moe.config import validate_mesh
    from moe.step import build, place

    mesh = sharding.make_mesh(config.mesh)
    validate_mesh(config, mesh.shape)
    shape = (config.train.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(3, config.model.vocab_size, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    rows = {"tokens": tokens, "targets": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        state, batch = program.init(), place(rows, mesh)
        state, _ = program.train_step(state, batch)  # compiles
        seconds, rates, together = [], [], []
        if _SEEDS.value > 1:
            states = jax.vmap(program.initialise)(np.arange(_SEEDS.value))
            batches = jax.tree.map(lambda x: np.broadcast_to(x, (_SEEDS.value, *x.shape)), rows)
            vmapped = jax.jit(jax.vmap(program.train_step), donate_argnums=0)
            states, _ = vmapped(states, batches)
        for _ in range(_STEPS.value):
            if _SEEDS.value > 1:
                jax.block_until_ready(states)
                start = time.perf_counter()
                states, _ = vmapped(states, batches)
                jax.block_until_ready(states)
                together.append(time.perf_counter() - start)
            rates.append(flops.measured_matmul_rate(config.model.dtype, repeats=1))
            jax.block_until_ready(state)
            start = time.perf_counter()
            state, _ = program.train_step(state, batch)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - start)
    step, rate = statistics.median(seconds), statistics.median(rates)
    per_step = flops.train_flops_per_token(config.model, shape[1]) * tokens.size
    total, active = flops.count_parameters(config.model)
    print(f"parameters: {total:,} total, {active:,} active; huge pages: {'on' if platform.huge_pages() else 'off'}")
    print(f"model FLOPs per step of {tokens.size:,} tokens: {per_step / 1e9:.1f} GFLOP")
    print(f"step: median {step * 1e3:.0f} ms of {len(seconds)}, {min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f}")
    print(f"matmul rate: median {rate / 1e9:.0f} GFLOP/s, {min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f}")
    print(f"step rate: {per_step / step / 1e9:.0f} GFLOP/s, {tokens.size / step:,.0f} tokens/s")
    print(f"MFU: {per_step / step / rate:.2f}")
    if together:
        vmapped_step = statistics.median(together)
        print(
            f"{_SEEDS.value} seeds vmapped: median {vmapped_step * 1e3:.0f} ms, "
            f"{vmapped_step / step / _SEEDS.value:.2f} x as long as one after another"
        )


if __name__ == "__main__":
    cli.run(main)
