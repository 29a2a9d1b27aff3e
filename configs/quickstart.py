"""A small Mixtral-style model on two CPU cores."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Overrides of the defaults."""
    return base.get_config()
