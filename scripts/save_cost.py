"""Measure the cost of checkpoints: python scripts/save_cost.py [--config=FILE] [--every=50] [--window=10] [--pairs=12].

Trains the config (the quickstart by default) in pairs of windows of --window steps: one window of a pair starts with a
checkpoint and ends when it is on disk and the previous one is deleted, the other has none. Prints the cost as a share
of --every steps: median over pairs and its 95 % interval (order statistics, scipy.stats.quantile_test), in wall time
and in CPU time, which depends less on other programs.
"""

from pathlib import Path

from moe.system import process

if __name__ == "__main__":
    process.prepare()

from absl import flags

from moe.programs import cli

_CONFIG = cli.define_config(Path(__file__).parents[1] / "configs" / "quickstart.py")
_EVERY = flags.DEFINE_integer("every", 50, "Steps between checkpoints; costs are shares of their time.", lower_bound=1)
_WINDOW = flags.DEFINE_integer("window", 10, "Steps per window.", lower_bound=1)
_PAIRS = flags.DEFINE_integer("pairs", 12, "Number of pairs.", lower_bound=6)


def main() -> None:
    """Parse flags, measure and print."""
    config = cli.load_config(_CONFIG)
    import tempfile
    import time

    import jax
    import numpy as np
    import scipy.stats
    from etils import epath

    from moe.checkpoints.manager import Checkpoints
    from moe.config import validate_mesh
    from moe.data import pipeline
    from moe.lab.benchmarks.train_steps import refuse_more_than_the_model
    from moe.parallel.mesh import make_mesh
    from moe.training.batches import place
    from moe.training.step import build

    refuse_more_than_the_model(config)
    mesh = make_mesh(config.mesh)
    validate_mesh(config, mesh.shape)
    prepared = pipeline.prepare_run(config)
    iterator = pipeline.train_iterator(prepared, config.data, batch_size=config.train.batch_size, seed=config.seed)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        program = build(config, mesh)
        state = program.init()
        checkpoints = Checkpoints(epath.Path(folder), 1)
        blocked: list[float] = []

        def window(saves: bool, steps: int) -> tuple[float, float]:
            """(wall seconds, CPU seconds of all threads) of a window."""
            nonlocal state
            jax.block_until_ready(state)
            start, processor = time.perf_counter(), time.process_time()
            if saves:
                checkpoints.save(len(blocked) + 1, state, iterator, {}, None)
                blocked.append(time.perf_counter() - start)
            for _ in range(steps):
                state, _ = program.train_step(state, place(next(iterator), mesh))
            jax.block_until_ready(state)
            if saves:
                checkpoints.wait()
            return time.perf_counter() - start, time.process_time() - processor

        for _ in range(2):  # compile, and leave a checkpoint to delete
            window(True, 2)
        measured = []
        for pair in range(_PAIRS.value):
            order = (False, True) if pair % 2 else (True, False)  # alternating, so that drift cancels
            times = {saves: window(saves, _WINDOW.value) for saves in order}
            measured.append((times[False], times[True]))
        written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        checkpoints.close()
    without, with_save = np.moveaxis(np.array(measured), 1, 0)  # [pairs,2] each: wall, CPU seconds
    step = np.median(without, axis=0) / _WINDOW.value
    print(
        f"a step takes {step[0]:.3f} s, {step[1]:.3f} s of CPU time (medians of {_PAIRS.value} windows of "
        f"{_WINDOW.value} steps); a checkpoint is {written / 1e6:.0f} MB, which blocks the loop for "
        f"{np.median(blocked[2:]):.3f} s"
    )
    for name, seconds, one in zip(("wall time", "CPU time"), (with_save - without).T, step, strict=True):
        interval = scipy.stats.quantile_test(seconds, p=0.5).confidence_interval(0.95)
        median, low, high = (
            100 * (1 - 1 / (1 + lost / (_EVERY.value * one))) for lost in (np.median(seconds), *interval)
        )
        print(
            f"saving every {_EVERY.value} steps costs {median:.2f} % of throughput by {name}: median of {_PAIRS.value} "
            f"pairs, 95 % interval {low:.2f} to {high:.2f} % ({np.median(seconds):.2f} s a checkpoint)"
        )


if __name__ == "__main__":
    cli.run(
        main,
        examples=(
            "python scripts/save_cost.py --pairs=8",
            "python scripts/save_cost.py --config=tiny --window=2 --pairs=6",
        ),
    )
