"""What a rehearsal leaves open: the memory and the time of the pod's own program, at its real widths and a skew.

A program's memory does not depend on the router. Rows above :data:`moe.dispatch.exchange.ROUND_SIZE` times the mean
take further rounds of exchange, a loop that is part of the program whether it runs or not and keeps nothing from round
to round. So the compiler's answer holds for every round: a program that does not fit does not in the first.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moe.config import Config
from moe.dispatch.exchange import ROUND_SIZE
from moe.planner import make_plan
from moe.planner.chips import GiB
from moe.planner.memory_errors import DoesNotFitError
from moe.planner.scenario import Scenario
from moe.planner.topology import Topology


def kept(plan: dict[str, Any]) -> str:
    """Memory of a kept plan, as a phrase."""
    total, capacity = plan["memory_total"] / GiB, plan["capacity"] / GiB
    return f"the kept plan takes {total:.1f} of {capacity:.0f} GiB a device"


def rounds(config: Config, skew: float) -> str:
    """What a skew takes in memory, as a phrase; "" for a balanced router.

    Args:
        config: of the pod's run.
        skew: rows of the busiest device over the mean.
    """
    if skew <= 1:
        return ""
    if config.model.moe.dispatch != "dropless":
        return "with a capacity the skew drops tokens and takes no memory"
    return (
        f"a buffer holds {ROUND_SIZE:g} times the mean rows: a skew of {skew:.3g} takes {math.ceil(skew / ROUND_SIZE)} "
        "rounds of exchange, each in the memory of the first"
    )


def compiled(config: Config, pod: Topology, skew: float, programs: Path | None = None) -> tuple[str, bool]:
    """Compile the pod's program.

    Args:
        config: of the pod's run.
        pod: to compile for.
        skew: rows of the busiest device over the mean, which the others wait for.
        programs: folder of compiled programs that are read or kept.

    Returns:
        A phrase with the memory and the time of a step, or with the round that does not fit; and whether all fit.

    Raises:
        ConfigError: the config does not fit the mesh.
    """
    skew = skew if config.model.moe.dispatch == "dropless" else 1.0
    count = math.ceil(skew / ROUND_SIZE)
    try:
        plan = make_plan.make_plan(config, pod, Scenario(skew=skew), programs)
    except DoesNotFitError as error:
        return f"round 1 of {count}: {error}", False
    low, high = plan.step_interval
    memory = f"{plan.memory.total / GiB:.1f} of {plan.memory.capacity / GiB:.0f} GiB a device"
    each = f", in each of {count} rounds" if count > 1 else ""
    return f"compiled, it takes {memory}{each}, and {plan.step_seconds:.3g} s a step ({low:.3g} to {high:.3g})", True
