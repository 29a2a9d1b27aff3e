"""python main.py --config=configs/quickstart.py --workdir=DIR [--config.x.y=value ...]: trains, or resumes."""

from moe import platform

if __name__ == "__main__":
    platform.use_huge_pages()  # before JAX: it restarts this program once

import logging
import sys

from absl import app, flags
from ml_collections import config_flags

from moe.config import ConfigError, from_config_dict

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config(); --config.x.y=value overrides.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and reports.")


def main(argv: list[str]) -> None:
    """Config in, training out; errors in the config are one line on stderr and exit code 1."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; options start with --")
    # Orbax and Grain tell their every move at INFO.
    logging.getLogger().setLevel(logging.WARNING)
    try:
        config = from_config_dict(_CONFIG.value)
        from moe.train import train

        train(config, str(_WORKDIR.value))
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
