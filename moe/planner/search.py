"""Which mesh, remat policy and dispatch mode is fastest: all that can be, tried on the compiler; a table of them.

In: a config and the devices of a topology. Out: candidates that cannot run, counted by reason; the others' plans as
JSON, from the fastest predicted step to the slowest. What is compiled is remembered in a folder, so that a search that
was interrupted goes on, and several processes share one search.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from moe.atomic_files import write_whole
from moe.config import Config, ConfigError, MeshConfig, ModelConfig, sparse_layers, to_dict, validate_mesh
from moe.dispatch.modes import CONFIG_MODES
from moe.layers.ffn import GATED_ACTIVATIONS
from moe.models import flops
from moe.models.stack import REMAT_POLICIES
from moe.planner import fit
from moe.planner.chips import Chip
from moe.routing.resolve import validate

Plan = dict[str, Any]  # Plan.to_json(), or {"error": why there is none}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a model.

    Attributes:
        config: validated, against its mesh too.
        seconds: a guess of its step, good for nothing but the order in which to compile.
    """

    config: Config
    seconds: float


def meshes(devices: int, num_slices: int = 1) -> Iterator[MeshConfig]:
    """Every mesh of so many devices; between slices there is only ``data``."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for data, fsdp, expert in itertools.product(divisors, repeat=3):
        if devices % (data * fsdp * expert) == 0 and data % num_slices == 0:
            yield MeshConfig(data, fsdp, expert, devices // (data * fsdp * expert))


def candidates(
    config: Config, devices: int, chip: Chip, num_slices: int = 1
) -> tuple[list[Candidate], collections.Counter[str]]:
    """All combinations that may run, and how many cannot, by reason.

    First comes the best guess of every pair of remat policy and dispatch mode, then the second best of each, and so on:
    the guess knows meshes better than it knows kernels.

    Args:
        config: what is to be trained; its mesh, remat policy and dispatch mode are replaced.
        devices: of all slices.
        chip: of the devices.
        num_slices: joined by the data-center network.
    """
    found, pruned = [], collections.Counter[str]()
    sparse = config.model.moe.gate != "none"
    for mesh in meshes(devices, num_slices):
        sizes = dataclasses.asdict(mesh)
        for remat, mode in itertools.product(REMAT_POLICIES, CONFIG_MODES if sparse else (config.model.moe.dispatch,)):
            moe = dataclasses.replace(config.model.moe, dispatch=mode)
            model = dataclasses.replace(config.model, remat=remat, moe=moe)
            tried = dataclasses.replace(config, mesh=mesh, model=model)
            try:
                validate(tried)
                validate_mesh(tried, sizes)
            except ConfigError as error:
                pruned[re.sub(r" = \d+$", "", str(error))] += 1
                continue
            if not sparse and mesh.expert > 1:
                pruned["a dense model has no use for mesh.expert"] += 1
                continue
            bound, capacity = fit.lower_bound(tried, sizes), chip.memory // chip.devices
            if bound.parameters + bound.optimizer > capacity:
                pruned["parameters and optimizer alone do not fit"] += 1
            elif bound.total > capacity:
                pruned["with gradients and the least of activations it does not fit"] += 1
            else:
                found.append(Candidate(tried, guess_seconds(tried, chip)))
    ranks = collections.Counter[tuple[str, str]]()
    order = []
    for candidate in sorted(found, key=lambda candidate: candidate.seconds):
        pair = candidate.config.model.remat, candidate.config.model.moe.dispatch
        order.append((ranks[pair], candidate.seconds, len(order), candidate))
        ranks[pair] += 1
    return [candidate for *_, candidate in sorted(order, key=lambda entry: entry[:3])], pruned


def guess_seconds(config: Config, chip: Chip) -> float:
    """A step's arithmetic at peak plus its exchange over one ring per mesh axis, nothing overlapping.

    Arithmetic: the model's FLOPs; a third of the forward and backward pass more where it is recomputed, empty expert
    slots, one-hot matmuls, and every expert's matmul over every row where ``lax.ragged_dot`` has no kernel. Exchange:
    weights gathered forward, backward and in recomputation, and their gradients scattered, over fsdp; expert rows out
    and back, three times over; partial sums over tensor; gradients summed over data.
    """
    model, moe, mesh = config.model, config.model.moe, config.mesh
    length = config.data.sequence_length
    devices = mesh.data * mesh.fsdp * mesh.expert * mesh.tensor
    tokens = config.train.batch_size * length
    here = tokens / (devices / mesh.tensor)  # tokens of one device
    layers, moe_layers = model.num_layers, sum(sparse_layers(model))
    size = 4 if model.dtype == "float32" else 2

    into = 2 if model.activation in GATED_ACTIVATIONS else 1
    expert_parameters = moe_layers * (into + 1) * model.d_model * moe.d_ff
    rows = moe.experts_per_token * (moe.capacity_factor if moe.dispatch != "dropless" else 1.0)
    per_token, total = _of_model(fit.same_parameters(model), length)
    per_token += 6 * expert_parameters * (rows - moe.experts_per_token)
    if moe_layers and moe.dispatch == "einsum":  # in and out: [S,E·C] x [S,D]
        per_token += 12 * moe_layers * rows * (moe.group_size or length) * model.d_model
    if moe_layers and moe.dispatch == "dropless" and not chip.example.startswith("v5p"):
        per_token += 6 * expert_parameters * rows * (moe.num_experts - 1)
    per_token *= 1.0 if model.remat == "none" else 4 / 3
    arithmetic = per_token * tokens / (devices * chip.peak / chip.devices)

    def share(parts: int) -> float:
        return (parts - 1) / parts

    experts = expert_parameters * moe.num_experts
    passes = 3 if model.remat == "none" else 4
    weights = experts / (mesh.expert * mesh.tensor) * share(mesh.fsdp)
    weights += (total - experts) / mesh.tensor * share(mesh.fsdp * mesh.expert)
    sent = passes * weights * size
    sent += 6 * moe_layers * here * rows * model.d_model * size * share(mesh.expert) * mesh.expert / 4
    sent += 2 * passes * 2 * layers * here * model.d_model * size * share(mesh.tensor)
    sent += 2 * 4 * total / (mesh.fsdp * mesh.expert * mesh.tensor) * share(mesh.data)
    return arithmetic + sent / (2 * chip.link / chip.devices)


@functools.lru_cache
def _of_model(model: ModelConfig, length: int) -> tuple[float, int]:
    """(model FLOPs per token, parameters)."""
    return flops.train_flops_per_token(model, length), flops.count_parameters(model)[0]


class Cache:
    """Plans on disk, one file each, named by a hash of all that they follow from."""

    def __init__(self, folder: Path | str, topology: str, num_slices: int):
        """
        Args:
            folder: made if missing; processes that share it share the work.
            topology: name of the devices' arrangement.
            num_slices: of it.
        """
        self._folder = Path(folder).expanduser()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._common = [topology, num_slices, versions(), source_hash()]

    def path(self, config: Config) -> Path:
        """Where the plan of a config is, or will be."""
        text = json.dumps([to_dict(config), *self._common], sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def get(self, config: Config) -> Plan | None:
        """What is known of it."""
        with contextlib.suppress(FileNotFoundError):
            return json.loads(self.path(config).read_text())
        return None

    def put(self, config: Config, plan: Plan) -> None:
        """Remembers it: whole, or not at all."""
        write_whole(self.path(config), json.dumps(plan).encode())

    @contextlib.contextmanager
    def mine(self, config: Config) -> Iterator[bool]:
        """Whether this process may compile it now: no other one does. The kernel lets go however a process ends."""
        with self.path(config).with_suffix(".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def versions() -> list[str]:
    """Of what compiles: JAX, jaxlib and libtpu."""
    found = []
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} none")
    return found


def source_hash() -> str:
    """Of the package moe: another program is another plan."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def run(
    chosen: Sequence[Candidate],
    cache: Cache,
    compile_plan: Callable[[Config], Plan],
    progress: Callable[[Plan], object] = lambda plan: None,
) -> list[tuple[Candidate, Plan]]:
    """Plans of all candidates, the fastest step first, those without one last.

    What another process compiles at the moment is left for the end, and then waited for.

    Args:
        chosen: what to compile.
        cache: what is known already, by this process or another.
        compile_plan: config → plan. What it refuses (ConfigError), or the compiler, is remembered too.
        progress: called with each plan.
    """
    plans: dict[int, Plan] = {}
    waiting = list(range(len(chosen)))
    while waiting:
        left = []
        for i in waiting:
            plan = _plan_of(chosen[i].config, cache, compile_plan)
            if plan is None:
                left.append(i)
            else:
                plans[i] = plan
                progress(plan)
        if len(left) == len(waiting):
            time.sleep(0.5)
        waiting = left
    pairs = [(candidate, plans[i]) for i, candidate in enumerate(chosen)]
    return sorted(pairs, key=lambda pair: pair[1].get("step_seconds", float("inf")))


def _plan_of(config: Config, cache: Cache, compile_plan: Callable[[Config], Plan]) -> Plan | None:
    """The plan, or None if another process is at it."""
    if (known := cache.get(config)) is not None:
        return known
    with cache.mine(config) as mine:
        if not mine:
            return None
        known = cache.get(config)  # another process may have finished between the two
        if known is None:
            try:
                known = compile_plan(config)
            except (ConfigError, jax.errors.JaxRuntimeError) as error:
                known = {"error": " ".join(str(error).split())[:500]}
            cache.put(config, known)
        return known


def overrides(config: Config) -> str:
    """The flags that make main.py, or plan_pod.py, run it this way."""
    named = {f"mesh.{axis}": size for axis, size in dataclasses.asdict(config.mesh).items()}
    named["model.remat"] = config.model.remat
    if config.model.moe.gate != "none":
        named["model.moe.dispatch"] = config.model.moe.dispatch
    return " ".join(f"--config.{name}={value}" for name, value in named.items())


def render(results: Sequence[tuple[Candidate, Plan]], pruned: collections.Counter[str], skipped: int) -> str:
    """The table that a person reads.

    Args:
        results: from :func:`run`.
        pruned: from :func:`candidates`.
        skipped: candidates that were left out by the limit.
    """
    total = len(results) + pruned.total() + skipped
    lines = [f"{total} combinations of mesh, remat and dispatch; of these cannot run:"]
    lines += [f"  {count:6}  {reason}" for reason, count in pruned.most_common()] or ["  none"]
    lines += [
        f"{skipped} were not compiled, being behind in a rough guess of their step (--limit says how many are)",
        "",
    ]
    lines.append(
        f"{'':>3} {'data':>5} {'fsdp':>5} {'expert':>6} {'tensor':>6} {'remat':5} {'dispatch':8} {'step ms':>9} "
        f"{'MFU %':>6} {'tok/s/chip':>10} {'GiB':>7} {'compile s':>9}  bound by"
    )
    for rank, (candidate, plan) in enumerate(results, 1):
        config = candidate.config
        mesh = config.mesh
        mode = config.model.moe.dispatch if config.model.moe.gate != "none" else "-"
        line = f"{rank:3} {mesh.data:5} {mesh.fsdp:5} {mesh.expert:6} {mesh.tensor:6} {config.model.remat:5} {mode:8} "
        if "error" in plan:
            lines.append(line + plan["error"].partition(";")[0][:160])
            continue
        lines.append(
            line + f"{1e3 * plan['step_seconds']:9.1f} {100 * plan['mfu']:6.1f} "
            f"{plan['tokens_per_second_per_chip']:10,.0f} {plan['memory_total'] / 2**30:7.2f} "
            f"{plan['compile_seconds']:9.1f}  {plan['bound']}"
        )
    return "\n".join(lines)
