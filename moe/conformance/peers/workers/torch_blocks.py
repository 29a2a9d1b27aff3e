"""Run a PyTorch library's MoE blocks on prepared cases; runs in the library's own environment, without this project.

The command line is that of ``jobs.py``.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from typing import Any

import numpy as np
import torch
from jobs import Arrays, run, start
from torch import distributed, multiprocessing, nn
from torch.distributed.tensor import DTensor

#: E, D, F of every case.
NUM_EXPERTS = 8
D = 16
F = 24


@dataclasses.dataclass(kw_only=True)
class Block:
    """One block of a library; subclasses are its adapters.

    Attributes:
        rule: fields of moe.conformance.judge.rule.Rule that the block claims, without k.
        bias: has a selection bias.
        biases: its products have biases.
        k: K of the cases that do not set it.
        documented: fields of Variant in which the library says that it deviates from the equations.
        source: where it says so.
        read: what its source does besides, where it deviates from that too.
        skip: case → reason why it does not apply.
        run: expression of y in ``block`` and ``x``.
        has_balance: has a balance loss.
        has_z: has a z-loss.
        processes: of gloo, each of which runs the block on its part of every group's tokens, or on all of them.
        splits: each process has a part of the tokens.
        spread_code: lines that spread ``block`` over the processes, once its weights are loaded.
    """

    rule: dict[str, Any] = dataclasses.field(default_factory=dict)
    bias: bool = False
    biases: bool = False
    k: int = 2
    documented: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: str = ""
    read: str = ""
    skip: dict[str, str] = dataclasses.field(default_factory=dict)
    run: str = "block(x)"
    has_balance: bool = False
    has_z: bool = False
    processes: int = 1
    splits: bool = True
    spread_code: str = ""

    def given(self, k: int) -> str:
        """JSON of the settings that the lines of :meth:`code` read from ``given["settings"]``."""
        return ""

    def code(self, k: int) -> str:
        """Lines that make ``block`` with the library alone."""
        raise NotImplementedError

    def load(self, block: nn.Module, arrays: dict[str, torch.Tensor]) -> None:
        """Write a case's weights into the block: router [D,E], gate, up [E,D,F], down [E,F,D], and biases."""
        raise NotImplementedError

    def spread(self, scope: dict[str, Any]) -> nn.Module:
        """Split the loaded block over the processes; ``scope`` has the names of :meth:`code`."""
        exec(self.spread_code, scope)
        return scope["block"]

    def gradients(self) -> dict[str, str]:
        """Quantity → expression in ``block`` of its gradient, in the layout of the case."""
        raise NotImplementedError

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """Have the block write ``expert_index`` and ``combine_weights`` [T,K] while it runs."""

    def losses(self, k: int) -> str:
        """Lines after those of :meth:`code` that define the library's losses of the last y = block(x).

        ``balance_loss(mask)`` is scaled to be 1 at perfect balance, ``z_loss(mask)`` has no coefficient.
        """
        raise NotImplementedError

    def claims(self) -> dict[str, Any]:
        """Claims of the block, as JSON."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Block)} | {
            "gradients": self.gradients()
        }


def measure(adapter: Block, job: dict[str, Any], arrays: Arrays) -> Arrays:
    """Results of a block on a case, and its state before the run as ``state.NAME``."""
    scope = start(adapter, job, torch=torch, copy=copy)
    dtype, seen = getattr(torch, job["dtype"]), {}
    block = scope["block"].to(dtype)
    block.eval()
    with torch.no_grad():
        adapter.load(block, {name: torch.from_numpy(array) for name, array in arrays.items()})
    results = {f"state.{name}": value.clone() for name, value in block.state_dict().items()}
    block = scope["block"] = adapter.spread(scope)
    adapter.watch(block, seen)
    x = torch.from_numpy(arrays["x"]).to(dtype).requires_grad_(True)
    mask, cotangent = torch.from_numpy(arrays["mask"]), torch.from_numpy(arrays["cotangent"]).to(dtype)
    parts: list[dict[str, torch.Tensor]] = []
    for rows in torch.arange(len(x)).chunk(job["parts"]):
        y = eval(adapter.run, {"block": block, "x": x[rows], "torch": torch})
        y = (y[0] if isinstance(y, tuple) else y).reshape(x[rows].shape)
        chosen = {name: seen[name].detach() for name in ("expert_index", "combine_weights") if name in seen}
        parts.append({"y": y.detach(), **{name: value.reshape(*y.shape[:2], -1) for name, value in chosen.items()}})
        if job["forward_only"]:
            continue
        total = (y * mask[rows, :, None] * cotangent[rows]).sum()
        if job["balance"]:
            results["balance_loss"] = scope["balance_loss"](mask[rows])
            total = total + job["balance"] * results["balance_loss"]
        if job["z"]:
            results["z_loss"] = scope["z_loss"](mask[rows])
            total = total + job["z"] * results["z_loss"]
        total.backward()
    results |= {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if not job["forward_only"]:
        results["grad_x"] = x.grad
        results |= {name: eval(text, {"block": block, "torch": torch}) for name, text in adapter.gradients().items()}
    results = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in results.items()}
    results = {name: value.detach() for name, value in results.items()}
    return {name: (value.double() if value.is_floating_point() else value).numpy() for name, value in results.items()}


def measure_spread(adapter: Block, job: dict[str, Any], arrays: Arrays) -> Arrays:
    """Results of a block on a case, in one process or several."""
    if adapter.processes == 1:
        return measure(adapter, job, arrays)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (adapter, job, arrays, folder)
        multiprocessing.start_processes(_process, arguments, nprocs=adapter.processes, start_method="fork")
        with np.load(f"{folder}/results.npz") as archive:
            return dict(archive)


def _process(rank: int, adapter: Block, job: dict[str, Any], arrays: Arrays, folder: str) -> None:
    """One process. Where tokens are split, each has the router's gradient of its own, as in data parallelism."""
    count = adapter.processes
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    per_token = ("x", "mask", "cotangent")
    parts = count if adapter.splits else 1
    own = {
        name: np.split(array, parts, 1)[rank % parts] if name in per_token else array for name, array in arrays.items()
    }
    found: list[Any] = [None] * count
    distributed.all_gather_object(found, measure(adapter, job, own))
    if rank == 0:
        joined = found[0]
        for name in ("y", "grad_x", "expert_index", "combine_weights"):
            if name in joined:
                joined[name] = np.concatenate([part[name] for part in found[:parts]], axis=1)
        if "grad_router" in joined:
            joined["grad_router"] = sum(part["grad_router"] for part in found[:parts])
        np.savez(f"{folder}/results.npz", **joined)
    distributed.destroy_process_group()


def main(version: str, adapters: dict[str, Block]) -> None:
    """The program of a library's worker."""
    torch.set_num_threads(1)
    run(f"{version}, torch {torch.__version__}", adapters, measure_spread)
