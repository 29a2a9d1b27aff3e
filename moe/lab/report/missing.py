"""The runs that a suite lacks, and the time that they would take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from moe.lab.records import FINISHED, Key, Record
from moe.lab.report.markdown import spans
from moe.lab.schedule import PlannedRuns
from moe.lab.suite import Suite
from moe.system.escaping import markdown_table


def missing(suite: Suite, records: Sequence[Record], only: Callable[[Key], bool], *, sweep: bool = True) -> str:
    """A table of missing runs in the order in which they are trained, with their hours: the median over finished runs
    of the arm; of an arm without any, by its FLOPs and the pace of other runs.

    Args:
        suite: of the runs.
        records: of any suites.
        only: whether a run is asked for.
        sweep: see :meth:`moe.lab.schedule.PlannedRuns.runs`.
    """
    plan = PlannedRuns(suite, records)
    planned = list(filter(only, plan.runs(sweep=sweep)))
    lacking = [key for key in planned if plan.record(key) is None]
    finished = {key: record for key in planned if (record := plan.record(key)) and record.status == FINISHED}
    others = finished.values() or records
    paces = [record.costs["flops"] / record.seconds for record in others if record.costs]
    pace = statistics.median(paces) if paces else 0.0

    def hours(arm: str, steps: int) -> float:
        seconds = [record.seconds for key, record in finished.items() if (key.variant, key.steps) == (arm, steps)]
        if seconds or not pace:
            return statistics.median(seconds or [0.0]) / 3600
        return suite.costs(arm, steps)["flops"] / pace / 3600

    seeds: dict[tuple[str, int, float], list[int]] = {}
    for key in lacking:
        seeds.setdefault((key.variant, key.steps, key.learning_rate), []).append(key.seed)
    rows = [
        (arm, f"{steps:,}", f"{rate:g}", spans(found), _shown(hours(arm, steps) * len(found)))
        for (arm, steps, rate), found in seeds.items()
    ]
    count = f"{suite.name}: {len(lacking)} of {len(planned)} runs are missing"
    lines = [count]
    if rows:
        total = _shown(sum(hours(arm, steps) * len(found) for (arm, steps, _), found in seeds.items()))
        unknown = "" if pace else "; their pace is known once a run is finished"
        table = markdown_table(("arm", "steps", "learning rate", "seeds", "hours"), rows)
        lines = [table, "", f"{count}, {total} hours of one process{unknown}"]
    if unnamed := len(list(filter(only, plan.unnamed() if sweep else ()))):
        lines.append(f"The sweep will name about {unnamed} more.")
    return "\n".join(lines)


def _shown(hours: float) -> str:
    return f"{hours:.1f}" if hours else "–"
