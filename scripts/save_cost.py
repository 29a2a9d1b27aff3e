"""What saving costs: `python scripts/save_cost.py [--config=FILE] [--every=50] [--turns=4]`.

Trains the config (the quickstart by default) in windows of --every steps, one that begins with a checkpoint and one
without, in turns, in one process; a window with a checkpoint ends when that is on disk. Prints seconds per step of
both, and by how much of its throughput a run that saves every --every steps is slower. Keep the machine idle meanwhile.
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
_EVERY = flags.DEFINE_integer("every", 50, "Steps of a window.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 4, "Windows of each kind.", lower_bound=1)


def main() -> None:
    """Flags in, a few lines out."""
    config = cli.load_config(_CONFIG)
    import statistics
    import tempfile
    import time

    import jax
    from etils import epath

    from moe import sharding
    from moe.checkpoint import Checkpoints
    from moe.config import validate_mesh
    from moe.data import pipeline
    from moe.step import build, place

    mesh = sharding.make_mesh(config.mesh)
    validate_mesh(config, mesh.shape)
    prepared = pipeline.prepare(config.data, config.model.vocab_size)
    iterator = pipeline.train_iterator(prepared, config.data, batch_size=config.train.batch_size, seed=config.seed)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        program = build(config, mesh)
        state = program.init()
        checkpoints = Checkpoints(epath.Path(folder), 1)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        blocked, number = [], 0
        # The first pair of windows compiles, and is left out.
        for window in range(2 * _TURNS.value + 2):
            saves = window % 2 == 1
            jax.block_until_ready(state)
            start = time.perf_counter()
            if saves:
                number += 1
                checkpoints.save(number, state, iterator, {}, None)
                blocked.append(time.perf_counter() - start)
            for _ in range(_EVERY.value if window >= 2 else 2):
                state, _ = program.train_step(state, place(next(iterator), mesh))
            jax.block_until_ready(state)
            if saves:
                checkpoints.wait()
            if window >= 2:
                seconds[saves].append((time.perf_counter() - start) / _EVERY.value)
        written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        checkpoints.close()
    without, with_save = (statistics.median(seconds[saves]) for saves in (False, True))
    pairs = [slow / fast - 1 for fast, slow in zip(seconds[False], seconds[True], strict=True)]
    print(
        f"a step takes {without:.3f} s without saving, {with_save:.3f} s with a checkpoint every {_EVERY.value} steps"
    )
    print(f"a checkpoint is {written / 1e6:.0f} MB; the loop stands still for {statistics.median(blocked[1:]):.2f} s")
    print(
        f"saving costs {100 * (1 - without / with_save):.1f} % of throughput (medians of {_TURNS.value} windows; by "
        f"pairs from {100 * min(pairs):.1f} to {100 * max(pairs):.1f} %)"
    )


if __name__ == "__main__":
    cli.run(main)
