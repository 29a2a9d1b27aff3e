"""All defaults, listed with their units in docs/settings/; other configs override them.

Fine-tuning of a run or an import, with its model shape and tokenizer:

    python main.py --config=configs/base.py --workdir=/tmp/tuned --config.start.checkpoint=/tmp/imported \
        --config.data.dataset=/path/to/text
"""

import json
from pathlib import Path

from moe.config import Changes, ConfigError

_PLANS = Path(__file__).with_name("plans.json")


def get_config() -> Changes:
    """All defaults."""
    return Changes()


def use_best_plan(config: Changes, name: str, hardware: str) -> None:
    """Set the fields of the fastest plan that is kept in plans.json (moe plan --record).

    Args:
        config: changed in place.
        name: of the config's file.
        hardware: a slice or hosts, such as ``v5p-128``, ``v5p:4x4x4`` or ``h100:8x8``; "" changes nothing.

    Raises:
        ConfigError: no plan of the config is kept for it.
    """
    if not hardware:
        return
    plans = [plan for plan in json.loads(_PLANS.read_text()) if plan["config"] == name]
    alike = [plan for plan in plans if hardware in plan["slices"]]
    if not alike:
        slices = sorted({slice_name for plan in plans for slice_name in plan["slices"]})
        allowed = f"must be one of {', '.join(slices)}, whose plans are kept" if slices else "no plan of it is kept"
        raise ConfigError(f"configs/{name}.py:{hardware}: {allowed}")
    best = max(alike, key=lambda plan: plan["tokens_per_second_per_chip"])
    config.update_from_flattened_dict(best["flags"])
