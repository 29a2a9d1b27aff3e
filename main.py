"""python main.py --config=configs/quickstart.py --workdir=DIR [--config.x.y=value ...]: trains, or resumes."""

from moe import platform

if __name__ == "__main__":
    platform.use_allocator()  # before JAX: it restarts this program once

from absl import flags

from moe import cli

_CONFIG = cli.define_config()
_WORKDIR = cli.define_path("workdir", "Folder for checkpoints, metrics and reports; made if missing.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "This is one of several processes; the environment says which.")
_PROFILE = flags.DEFINE_string("profile", None, "STEP:COUNT: a trace of those steps in WORKDIR/profile (docs/pods.md).")


def main() -> None:
    """Flags in, training out."""
    config = cli.load_config(_CONFIG)
    if _DISTRIBUTED.value:
        platform.join_processes()
    from moe.training import profiling
    from moe.training.loop import train

    steps = profiling.parse(_PROFILE.value, config.train.num_steps) if _PROFILE.value is not None else None
    with profiling.profiled(steps, str(_WORKDIR.value)) as make_program:
        train(config, str(_WORKDIR.value), make_program=make_program)


if __name__ == "__main__":
    cli.run(main, required=("config", "workdir"))
