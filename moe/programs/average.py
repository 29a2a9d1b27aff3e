"""moe average --workdir=RUN --out=WORKDIR: a workdir with the average of a run's checkpoints.

Averages the weights of the checkpoints that --steps names, by default all that the run has kept; --ema takes the moving
average of the newest one instead (optimizer.ema_decay). Generate, evaluate, fine-tune or export from WORKDIR.
"""

from absl import flags

from moe.programs import cli

_WORKDIR = cli.define_path("workdir", "Folder of a run.")
_OUT = cli.define_path("out", "Workdir to create.")
_STEPS = flags.DEFINE_list("steps", [], "Steps of the checkpoints; default: all that are there.")
_EMA = flags.DEFINE_bool("ema", False, "Take the exponential moving average of the newest checkpoint.")


def main() -> None:
    """Average, write, and say what was averaged."""
    from moe.config import ConfigError
    from moe.system.fields import whole_number
    from moe.training.averaging import write_average

    steps = []
    for step in _STEPS.value or []:
        number = whole_number(str(step))
        if number is None:
            raise ConfigError(f"--steps={step}: must be numbers, as in 100,200")
        steps.append(number)
    if steps and _EMA.value:
        raise ConfigError("--steps: is not read with --ema, which reads the newest checkpoint")
    print(write_average(str(_WORKDIR.value), str(_OUT.value), steps, ema=bool(_EMA.value)))


def run() -> None:
    """The program."""
    cli.run(
        main,
        required=("workdir", "out"),
        examples=(
            "moe average --workdir=/tmp/run --out=/tmp/average --steps=800,900,1000",
            "moe average --workdir=/tmp/run --out=/tmp/average --ema",
        ),
    )
