"""Train or resume: moe train --config=quickstart --workdir=DIR [--config.x.y=value ...]."""

from absl import flags

from moe.programs import cli

_CONFIG = cli.define_config()
_WORKDIR = cli.define_path("workdir", "Folder for checkpoints, metrics and reports; created if missing.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of this run.")
_CHANGE = flags.DEFINE_bool(
    "change", False, "Continue a run with another train.num_steps, learning rate or schedule (docs/runs.md)."
)
_PROFILE = flags.DEFINE_string("profile", None, "STEP:COUNT: trace COUNT steps from STEP (docs/launching.md).")


def main() -> None:
    """Parse flags and train."""
    from moe.parallel.mesh import join_processes
    from moe.system import compilation_cache, signals, supervisor
    from moe.training import profiling
    from moe.training.train import train

    config = cli.load_config(_CONFIG)
    if _DISTRIBUTED.value:
        supervisor.supervise(config.train.host_timeout)
        join_processes(config.train.host_timeout)
    with signals.ended_together(config.train.host_timeout):
        compilation_cache.use(config.train.compilation_cache, str(_WORKDIR.value))
        steps = profiling.parse(_PROFILE.value, config.train.num_steps) if _PROFILE.value is not None else None
        with profiling.profiled(steps, str(_WORKDIR.value)) as make_program:
            train(config, str(_WORKDIR.value), make_program=make_program, allow_changes=_CHANGE.value)


def run() -> None:
    """The program."""
    cli.run(
        main,
        required=("config", "workdir"),
        examples=(
            "moe train --config=quickstart --workdir=/tmp/quickstart",
            "moe train --config=switch --workdir=/tmp/switch --config.seed=1",
            "moe train --workdir=/tmp/switch  # continue the run with the config that it holds",
        ),
    )
