"""Every field with its default; each is listed once, with its unit, in ``moe/config.py``. Other configs override."""

import ml_collections

from moe.config import Config, to_config_dict


def get_config() -> ml_collections.ConfigDict:
    """All defaults."""
    return to_config_dict(Config())
