"""python main.py --config=configs/quickstart.py --workdir=DIR [--config.x.y=value ...]: trains, or resumes."""

from moe import platform

if __name__ == "__main__":
    platform.use_huge_pages()  # before JAX: it restarts this program once

from absl import flags

from moe import cli

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and reports; made if missing.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "This is one of several processes; the environment says which.")


def main() -> None:
    """Flags in, training out."""
    config = cli.load_config(_CONFIG)
    if _DISTRIBUTED.value:
        platform.join_processes()
    from moe.train import train

    train(config, str(_WORKDIR.value))


if __name__ == "__main__":
    cli.run(main, required=("config", "workdir"))
