"""An npz file and a script of at most 20 lines that show a deviation with the library alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moe.conformance import equations
from moe.conformance.equations import Variant
from moe.conformance.peers.cases import CASES
from moe.conformance.peers.suite import Cell, Library, layer_of_claims, rule_of
from moe.system.atomic_files import write_atomic
from moe.system.npz_files import write_arrays

_TORCH = """import numpy as np
import torch
a = np.load(__file__[:-2] + "npz")
{code}
block = block.to(torch.{dtype}).eval()
with torch.no_grad():
    for key, value in (*block.named_parameters(), *block.named_buffers()):
        value.copy_(torch.from_numpy(a["state." + key]))
x = torch.from_numpy(a["x"]).to(torch.{dtype}).requires_grad_(True)
y = {run}
y = (y[0] if isinstance(y, tuple) else y).reshape(x.shape)
(y * torch.from_numpy(a["cotangent"] * a["mask"][..., None]).to(y.dtype)).sum().backward()
found, expected = ({expression}).detach().double().numpy(), a["expected"]
"""
_JAX = """import contextlib, jax, numpy as np
a = {{name: array.astype(np.float32) for name, array in np.load(__file__[:-2] + "npz").items()}}
{code}
def run(weights, x):
    y = layer(weights, x, a["mask"] > 0)
    y = y[0] if isinstance(y, tuple) else y
    return (y * a["mask"][..., None] * a["cotangent"]).sum(), y
with jax.set_mesh(mesh) if "mesh" in globals() else contextlib.nullcontext():
    weights = {{name[6:]: array for name, array in a.items() if name.startswith("state.")}}
    gradients, y = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(weights, a["x"])
found, expected = np.asarray({expression}), a["expected"]
"""
_LAST = 'print("largest difference", abs(found - expected).max(), "of", abs(expected).max())\n'


def write(out: Path, library: Library, cell: Cell) -> None:
    """Write ``out/reproduce/LIBRARY.BLOCK.CASE.npz`` and ``.py`` for the quantity that differs most.

    Nothing is written for sums over microbatches, whose parts the case "main" shows, nor for the value of a loss.
    """
    claims = library.blocks[cell.block]
    case = next(case for case in CASES if case.name == cell.case)
    made = out / library.name / "results" / f"{cell.block}.{cell.case}"
    code, layer = made.with_name(made.name + ".code"), layer_of_claims(claims, case)
    in_jax = claims.get("framework") == "jax"
    gradients = {f"grad_{name}": f"gradients[0]['{name}']" for name in layer.weights} if in_jax else claims["gradients"]
    expressions = {"y": "y", **gradients, "grad_x": "gradients[1]" if in_jax else "x.grad"}
    if not code.exists() or case.parts > 1 or cell.quantity in ("balance_loss", "z_loss"):
        return
    quantity = cell.quantity if cell.quantity in expressions else "y"
    expected = equations.compute(rule_of(claims, case), Variant(), layer)
    with np.load(made.with_name(made.name + ".npz"), allow_pickle=False) as archive:
        state: dict[str, Any] = {name: archive[name] for name in archive.files if name.startswith("state.")}
    if in_jax:
        state = {f"state.{name}": array for name, array in layer.weights.items() if name != "x"}
        state |= {} if layer.bias is None else {"state.bias": layer.bias}
    given = {"x": layer.x, "mask": layer.mask, "cotangent": np.asarray(layer.cotangent)}
    folder = out / "reproduce"
    folder.mkdir(exist_ok=True)
    name = f"{library.name}.{cell.block}.{cell.case}".replace(" ", "_")
    write_arrays(folder / f"{name}.npz", state | given | {"expected": expected[quantity]})
    values = {"code": code.read_text(), "run": claims["run"], "expression": expressions[quantity], "dtype": case.dtype}
    first = f'"""{name}: {quantity} of the block beside what its claimed rule gives."""\n'
    write_atomic(folder / f"{name}.py", first + (_JAX if in_jax else _TORCH).format(**values) + _LAST)
