"""An npz file and a script of about 20 lines that show a deviation with the library alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe.conformance import equations
from moe.conformance.peers.cases import BALANCE_WEIGHT, CASES, Case
from moe.conformance.peers.environments import Environment
from moe.conformance.peers.suite import TOLERANCE, WORKERS, Cell, Library, layer_of_claims, rule_of
from moe.conformance.rule import Layer, Variant
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
    code, layer = made.with_name(made.name + ".code").read_text(), layer_of_claims(claims, case)
    in_jax = claims.get("framework") == "jax"
    expressions = _in_jax(layer) if in_jax else _in_torch(claims, case)
    quantity = cell.quantity if cell.quantity in expressions else "y"
    expected = equations.compute(rule_of(claims, case), Variant(**claims["documented"]), layer)[quantity]
    cotangent = np.asarray(layer.cotangent) * layer.mask[..., None]
    state = _weights(layer) if in_jax else _state(made.with_name(made.name + ".npz"))
    arrays: dict[str, Any] = {"x": layer.x, "cotangent": cotangent, **state}
    arrays = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    script = path(out, cell)
    script.parent.mkdir(exist_ok=True)
    write_arrays(script.with_suffix(".npz"), arrays | {"mask": layer.mask, "expected": expected})
    first = f'"""{cell.block} of {library.name}, {cell.column}: {quantity} beside what its claimed rule gives."""\n'
    expression = expressions[quantity]
    text = _jax_text(code, expression, case) if in_jax else _torch_text(code, expression, claims, case)
    write_atomic(script, first + text)


def _weights(layer: Layer) -> dict[str, np.ndarray]:
    """Weights of a layer in JAX, by the names that it reads."""
    arrays = {name: array for name, array in layer.weights.items() if name != "x"}
    return arrays if layer.bias is None else arrays | {"bias": layer.bias}


def _state(file: Path) -> dict[str, np.ndarray]:
    """Parameters and buffers of a block in PyTorch before its run, as ``state.NAME``."""
    with np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files if name.startswith("state.")}


def _in_jax(layer: Layer) -> dict[str, str]:
    """Quantity → its expression in a script in JAX."""
    gradients = {f"grad_{name}": f"sum(part[0]['{name}'] for part in results)" for name in layer.weights}
    joined = {"grad_x": "np.concatenate([part[0]['x'] for part in results])"}
    return gradients | joined | {"y": "np.concatenate([part[1] for part in results])"}


def _in_torch(claims: Mapping[str, Any], case: Case) -> dict[str, str]:
    """Quantity → its expression in a script in PyTorch."""
    losses = {"balance_loss": "loss"} if case.balance else {}
    return claims["gradients"] | {"grad_x": "whole.grad", "y": "torch.cat(outputs)"} | losses


def _jax_text(code: str, expression: str, case: Case) -> str:
    """A script in JAX."""
    split = _PARTS.format(parts=case.parts) if case.parts > 1 else "parts = [a]"
    return _JAX.format(code=code, split=split, expression=expression) + _LAST


def _torch_text(code: str, expression: str, claims: Mapping[str, Any], case: Case) -> str:
    """A script in PyTorch, of one process or several."""
    processes, spread = claims.get("processes", 1), claims.get("spread_code", "").strip()
    launch, last = "", _LAST
    if processes > 1:
        launch = _PROCESSES.format(processes=processes)
        expression = f"getattr({expression}, 'full_tensor', lambda: {expression})()"
        last = f"if torch.distributed.get_rank() == 0:\n    {_LAST}"
    body = _TORCH.format(
        code=code,
        run=claims["run"],
        parts=case.parts,
        launch=launch,
        spread=f"\n{spread}" if spread else "",
        loss="    loss = balance_loss(mask)\n" if case.balance else "",
        weighted=f" + {BALANCE_WEIGHT} * loss" if case.balance else "",
        expression=expression,
    )
    return body + last


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
