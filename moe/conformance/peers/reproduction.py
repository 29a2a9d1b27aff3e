"""An npz file and a script of about 20 lines that show a deviation with the library alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe.conformance import equations
from moe.conformance.peers.cases import BALANCE_WEIGHT, CASES
from moe.conformance.peers.environments import Environment
from moe.conformance.peers.suite import TOLERANCE, WORKERS, Cell, Library, layer_of_claims, rule_of
from moe.conformance.rule import Variant
from moe.system.atomic_files import write_atomic
from moe.system.npz_files import write_arrays

#: A script's microbatches in JAX.
_PARTS = """rows = np.split(np.arange(len(a["x"])), {parts})
parts = [a | {{name: a[name][part] for name in ("x", "mask", "cotangent")}} for part in rows]"""
#: A script that starts itself in several processes.
_PROCESSES = """
import os, subprocess, sys
if "RANK" not in os.environ:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node={processes}", __file__]
    sys.exit(subprocess.call(launch))
torch.distributed.init_process_group("gloo")"""
_TORCH = """import numpy as np
import torch{launch}
a = {{name: torch.from_numpy(array) for name, array in np.load(__file__[:-2] + "npz").items()}}
{code}
block.eval().load_state_dict({{name[6:]: array for name, array in a.items() if name.startswith("state.")}}){spread}
whole, outputs = a["x"].requires_grad_(True), []
for x, cotangent, mask in zip(*(array.chunk({parts}) for array in (whole, a["cotangent"], a["mask"]))):
    y = {run}
    outputs.append((y[0] if isinstance(y, tuple) else y).reshape(x.shape))
{loss}    ((outputs[-1] * cotangent).sum(){weighted}).backward()
found, expected = ({expression}).detach().double().numpy(), a["expected"].numpy()
"""
_JAX = """import jax
import numpy as np
{code}
a = {{name: array.astype(np.float32) for name, array in np.load(__file__[:-2] + "npz").items()}}
def run(a):
    y = jax.tree.leaves(layer(a, a["x"], a["mask"] > 0))[0]
    return (y * a["cotangent"]).sum(), y
{split}
results = [jax.jit(jax.grad(run, has_aux=True))(part) for part in parts]
found, expected = np.asarray({expression}), a["expected"]
"""
_LAST = 'print("largest difference", abs(found - expected).max(), "of", abs(expected).max())\n'
_PRINTED = re.compile(r"^largest difference (\S+) of (\S+)$", re.MULTILINE)


def path(out: Path, cell: Cell) -> Path:
    """The script of a cell."""
    return out / "reproduce" / f"{cell.library}.{cell.block}.{cell.column}.py".replace(" ", "_")


def write_all(out: Path, library: Library, cells: Sequence[Cell]) -> None:
    """Write the script and npz of each deviating cell, instead of those of an earlier run."""
    for stale in (out / "reproduce").glob(f"{library.name}.*"):
        stale.unlink()
    for cell in cells:
        if cell.status == "deviates":
            _write(out, library, cell)


def _write(out: Path, library: Library, cell: Cell) -> None:
    """Write a cell's script and, beside it, its npz, which show the quantity that differs most.

    A choice, or combine weights, are shown by y, since not every library returns them.
    """
    claims = library.blocks[cell.block]
    case = next(case for case in CASES if case.name == cell.case)
    made = out / library.name / "results" / f"{cell.block}.{cell.case}"
    layer = layer_of_claims(claims, case)
    in_jax = claims.get("framework") == "jax"
    weights = {name: array for name, array in layer.weights.items() if name != "x"}
    if in_jax:
        expressions = {f"grad_{name}": f"sum(part[0]['{name}'] for part in results)" for name in weights}
        expressions |= {"grad_x": "np.concatenate([part[0]['x'] for part in results])"}
        expressions |= {"y": "np.concatenate([part[1] for part in results])"}
        state = weights if layer.bias is None else weights | {"bias": layer.bias}
    else:
        expressions = claims["gradients"] | {"grad_x": "whole.grad", "y": "torch.cat(outputs)"}
        expressions |= {"balance_loss": "loss"} if case.balance else {}
        with np.load(made.with_name(made.name + ".npz"), allow_pickle=False) as archive:
            state = {name: archive[name] for name in archive.files if name.startswith("state.")}
    quantity = cell.quantity if cell.quantity in expressions else "y"
    expected = equations.compute(rule_of(claims, case), Variant(**claims["documented"]), layer)[quantity]
    cotangent = np.asarray(layer.cotangent) * layer.mask[..., None]
    arrays: dict[str, Any] = {"x": layer.x, "cotangent": cotangent, **state}
    arrays = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    script = path(out, cell)
    script.parent.mkdir(exist_ok=True)
    write_arrays(script.with_suffix(".npz"), arrays | {"mask": layer.mask, "expected": expected})
    values = {"code": made.with_name(made.name + ".code").read_text(), "expression": expressions[quantity]}
    values |= {"run": claims["run"], "parts": case.parts}
    values |= {"split": _PARTS.format(parts=case.parts) if case.parts > 1 else "parts = [a]"}
    values |= {"loss": "    loss = balance_loss(mask)\n" if case.balance else ""}
    values |= {"weighted": f" + {BALANCE_WEIGHT} * loss" if case.balance else ""}
    processes = claims.get("processes", 1)
    values |= {"launch": _PROCESSES.format(processes=processes) if processes > 1 else ""}
    if processes > 1:
        values["expression"] = f"getattr({expressions[quantity]}, 'full_tensor', lambda: {expressions[quantity]})()"
    last = f"if torch.distributed.get_rank() == 0:\n    {_LAST}" if processes > 1 else _LAST
    values |= {"spread": "\n" + claims["spread_code"].strip() if claims.get("spread_code") else ""}
    first = f'"""{cell.block} of {library.name}, {cell.column}: {quantity} beside what its claimed rule gives."""\n'
    write_atomic(script, first + (_JAX if in_jax else _TORCH).format(**values) + last)


def run(out: Path, environment: Environment, cells: Sequence[Cell]) -> dict[str, float]:
    """Run the script of each deviating cell in its library's environment.

    Returns:
        block, column → the relative difference that the script printed; NaN where it failed.
    """
    deviating = [cell for cell in cells if cell.status == "deviates"]
    if not deviating:
        return {}
    scripts = [str(path(out, cell)) for cell in deviating]
    printed = environment.run(WORKERS / "scripts.py", *scripts)
    found = {}
    for cell, script in zip(deviating, scripts, strict=True):
        text = printed.split(f"{script}\n", 1)[1].split(str(out / "reproduce"), 1)[0]
        numbers = _PRINTED.search(text)
        if numbers is None:
            print(f"  {script}: {text.strip()}")
        found[f"{cell.block}, {cell.column}"] = float(numbers[1]) / float(numbers[2]) if numbers else math.nan
    return found


def sentence(reproduced: Mapping[str, float]) -> str:
    """Number of cells whose script shows a difference above the tolerance."""
    shown = [difference for difference in reproduced.values() if difference > TOLERANCE]
    smallest = f", by {min(shown):.2g} or more" if shown else ""
    return f"{len(shown)} of {len(reproduced)} deviating cells are reproduced by their script alone{smallest}"
