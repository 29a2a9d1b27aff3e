"""Search for the fastest mesh, remat policy, dispatch mode and rows: candidates are compiled and ranked by tokens/s.

Plans are kept in a folder, so that an interrupted search continues and several processes share one search.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from moe.config import Config, ConfigError, to_dict
from moe.config.user_code import user_code
from moe.planner.candidates import Candidate
from moe.planner.guide import Guide
from moe.planner.memory_errors import DoesNotFitError
from moe.planner.topology import Topology
from moe.planner.versions import source_hash, versions
from moe.system.atomic_files import lock, write_atomic
from moe.system.foreign_files import read_object

#: moe.planner.plan.Plan.to_json(), or {"error": message}, with "memory_least" (bytes) if the memory is too small.
PlanJson = dict[str, Any]


class Cache:
    """Plans on disk, one file each, named by a hash of config, topology, scenario, versions and all source."""

    def __init__(self, folder: Path | str, topology: Topology, scenario: str = ""):
        """
        Args:
            folder: created if missing; processes that share it share the work.
            topology: of the plans; machines with the same GPU may differ in their network.
            scenario: of the plans, in words; "" for none.
        """
        self._folder = Path(folder).expanduser()
        self._folder.mkdir(parents=True, exist_ok=True)
        chip = dataclasses.asdict(topology.chip)
        self._common = [topology.name, topology.num_slices, chip, scenario, versions(), source_hash()]

    def path(self, config: Config) -> Path:
        """Path of a config's plan, existing or not."""
        text = json.dumps([to_dict(config), user_code(config), *self._common], sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def get(self, config: Config) -> PlanJson | None:
        """The stored plan; None if it is missing or damaged, so that it is made again."""
        with contextlib.suppress(ConfigError):
            return read_object(self.path(config))
        return None

    def put(self, config: Config, plan: PlanJson) -> None:
        """Store a plan atomically."""
        write_atomic(self.path(config), json.dumps(plan).encode())

    @contextlib.contextmanager
    def mine(self, config: Config) -> Iterator[bool]:
        """Lock a config's plan; yields False if another process holds the lock (released when it ends).

        On a file system without locks several processes may make the same plan.
        """
        with self.path(config).with_suffix(".lock").open("a") as file:
            try:
                lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def run(
    found: Sequence[Candidate],
    cache: Cache,
    compile_plan: Callable[[Config], PlanJson],
    limit: int,
    capacity: float = math.inf,
    progress: Callable[[PlanJson], object] = lambda plan: None,
) -> list[tuple[Candidate, PlanJson]]:
    """Compile the most promising candidates, each chosen with the plans so far (:class:`moe.planner.guide.Guide`).

    Candidates that another process compiles at the moment are passed over, and waited for if nothing else is left.

    Args:
        found: all candidates.
        cache: plans that exist already.
        compile_plan: config → plan; its ConfigErrors and the compiler's errors are stored as plans too.
        limit: candidates to compile, or to read from the cache.
        capacity: bytes of a device's memory.
        progress: called with each plan.

    Returns:
        The candidates and their plans, most tokens/s first, those with errors last.
    """
    guide, plans = Guide(found, capacity), dict[int, PlanJson]()
    while len(plans) < min(limit, len(found)):
        for index in guide.order()[: limit - len(plans)]:
            plan = _plan_of(found[index].config, cache, compile_plan)
            if plan is not None:
                plans[index] = plan
                guide.learn(index, plan)
                progress(plan)
                break
        else:
            time.sleep(0.5)
    pairs = [(found[index], plan) for index, plan in plans.items()]
    return sorted(pairs, key=lambda pair: -pair[1].get("tokens_per_second_per_chip", 0.0))


def _plan_of(config: Config, cache: Cache, compile_plan: Callable[[Config], PlanJson]) -> PlanJson | None:
    """The plan, or None if another process is compiling it."""
    if (known := cache.get(config)) is not None:
        return known
    with cache.mine(config) as mine:
        if not mine:
            return None
        known = cache.get(config)  # another process may have finished since the first look
        if known is None:
            try:
                known = compile_plan(config)
            except (ConfigError, jax.errors.JaxRuntimeError) as error:
                least = {"memory_least": error.least} if isinstance(error, DoesNotFitError) else {}
                known = {"error": " ".join(str(error).split())[:500], **least}
            cache.put(config, known)
        return known


#: Fields that a search sets beside those of the mesh.
SEARCHED = (
    "model.remat", "model.moe.dispatch", "model.moe.exchange", "model.moe.exchange_chunks", "model.moe.exchange_hosts",
    "train.batch_size",
)  # fmt: skip


def overrides(config: Config) -> str:
    """Flags of ``moe train`` and ``moe plan`` that select a candidate: the mesh and :data:`SEARCHED`."""
    named: dict[str, Any] = {f"mesh.{axis}": size for axis, size in dataclasses.asdict(config.mesh).items()}
    unread = "model.moe." if config.model.moe.gate is None else ()
    named |= {name: operator.attrgetter(name)(config) for name in SEARCHED if not name.startswith(unread)}
    return " ".join(f"--config.{name}={value}" for name, value in named.items())


def render(results: Sequence[tuple[Candidate, PlanJson]], pruned: collections.Counter[str], skipped: int) -> str:
    """The table of the candidates as text.

    Args:
        results: from :func:`run`.
        pruned: from :func:`moe.planner.candidates.candidates`.
        skipped: number of candidates beyond the limit.
    """
    total = len(results) + pruned.total() + skipped
    lines = [f"{total} combinations of mesh, remat, dispatch and rows, of which these cannot run:"]
    lines += [f"  {count:6}  {reason}" for reason, count in pruned.most_common()] or ["  none"]
    lines += [
        f"{skipped} were not compiled: the estimate, corrected by every compiled plan, ranks them lower (--limit)",
        "",
    ]
    lines.append(
        f"{'':>3} {'data':>5} {'fsdp':>5} {'expert':>6} {'tensor':>6} {'remat':9} {'dispatch':8} {'rows':>5} "
        f"{'step s (80 %)':>22} {'MFU %':>6} {'tok/s/chip':>10} {'GiB':>7} {'compile s':>9}  bound by"
    )
    for rank, (candidate, plan) in enumerate(results, 1):
        config = candidate.config
        mesh = config.mesh
        mode = config.model.moe.dispatch if config.model.moe.gate is not None else "-"
        rows = config.train.batch_size / (mesh.data * mesh.fsdp * mesh.expert)
        line = f"{rank:3} {mesh.data:5} {mesh.fsdp:5} {mesh.expert:6} {mesh.tensor:6} {config.model.remat:9} {mode:8} "
        line += f"{rows:5g} "
        if "error" in plan:
            lines.append(line + plan["error"].partition(";")[0][:160])
            continue
        low, high = plan["step_interval"]
        step = f"{plan['step_seconds']:.3g} ({low:.3g} to {high:.3g})"
        lines.append(
            line + f"{step:>22} {100 * plan['mfu']:6.1f} "
            f"{plan['tokens_per_second_per_chip']:10,.0f} {plan['memory_total'] / 2**30:7.2f} "
            f"{plan['compile_seconds']:9.1f}  {plan['bound']}"
        )
    return "\n".join(lines)
