"""An npz file and a script of at most 20 lines that show a deviation, or an error, with the library alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe.conformance.judge import equations
from moe.conformance.judge.rule import Layer, Variant
from moe.conformance.peers.cases import BALANCE_WEIGHT, CASES, Case
from moe.conformance.peers.environments import Environment
from moe.conformance.peers.suite import TOLERANCE, WORKERS, Cell, Library, layer_of_claims, rule_of
from moe.system.atomic_files import write_atomic
from moe.system.npz_files import write_arrays

_TORCH = """{begin}given = np.load(__file__[:-2] + "npz")
{code}
{load}{spread}parts, cotangent, mask = (torch.from_numpy(given[name]) for name in ("x", "cotangent", "mask"))
y = torch.cat([y[0] if isinstance(y := {run}, tuple) else y for x in parts.requires_grad_(True)])\
.reshape(-1, *parts[0].shape[1:])
{backward}found = {expression}.detach().double().numpy()
"""
_LOAD = (
    "block.eval().load_state_dict("
    '{name[6:]: torch.from_numpy(given[name]) for name in given if name.startswith("state.")})\n'
)
_JAX = """import jax
import numpy as np
given = np.load(__file__[:-2] + "npz")
{code}
weights = {{name[8:]: given[name] for name in given if name.startswith("weights.")}}
{gradient}found = {expression}
"""
_GRADIENT = (
    "gradient = jax.jit(jax.grad(lambda weights, x, cotangent: (layer(weights, x)[0] * cotangent).sum(), (0, 1)))\n"
)
_PARTS = 'for part in zip(given["x"], given["cotangent"])'
_LAST = 'print("largest difference", abs(found - given["expected"]).max(), "of", abs(given["expected"]).max())\n'
#: Lines of several processes may interleave.
_OF_THE_FIRST = "torch.distributed.get_rank() or "
_PRINTED = re.compile(r"^largest difference (\S+) of (\S+)$", re.MULTILINE)
SHOWN = ("deviates", "raises")


def path(out: Path, cell: Cell) -> Path:
    """The script of a cell."""
    return out / "reproduce" / f"{cell.library}.{cell.block}.{cell.column}.py".replace(" ", "_")


def write_all(out: Path, library: Library, cells: Sequence[Cell]) -> None:
    """Write the script and npz of each cell that deviates or raises an error, instead of those of an earlier run."""
    for stale in (out / "reproduce").glob(f"{library.name}.*"):
        stale.unlink()
    for cell in cells:
        if cell.status in SHOWN:
            _write(out, library, cell)


def _write(out: Path, library: Library, cell: Cell) -> None:
    """Write a cell's script and, beside it, its npz, which show the quantity that differs most.

    A choice, or combine weights, are shown by y, since not every library returns them. An error is shown with the
    weights that the block has when it is made.
    """
    claims = library.blocks[cell.block]
    case = next(case for case in CASES if case.name == cell.case)
    made = out / library.name / "results" / f"{cell.block}.{cell.case}"
    code, layer = made.with_name(made.name + ".code").read_text(), layer_of_claims(claims, case)
    in_jax = claims.get("framework") == "jax"
    expressions = _in_jax(claims, layer) if in_jax else _in_torch(claims, case)
    raises = cell.status == "raises"
    wanted = "grad_x" if raises and not case.forward_only else cell.quantity
    quantity = wanted if wanted in expressions else "y"
    expected = equations.compute(rule_of(claims, case), Variant(**claims["documented"]), layer)[quantity]
    cotangent = np.asarray(layer.cotangent) * layer.mask[..., None]
    state = _weights(claims, layer) if in_jax else {} if raises else _state(made.with_name(made.name + ".npz"))
    inputs = {"x": layer.x, "cotangent": cotangent, "mask": layer.mask}
    arrays: dict[str, Any] = state | {name: np.stack(np.split(array, case.parts)) for name, array in inputs.items()}
    arrays = {name: array if array.dtype == bool else array.astype(np.float32) for name, array in arrays.items()}
    settings = json.loads(made.with_name(made.name + ".json").read_text())
    arrays |= {"settings": np.array(settings)} if settings else {}
    place = path(out, cell)
    place.parent.mkdir(exist_ok=True)
    write_arrays(place.with_suffix(".npz"), arrays | {"expected": expected})
    processes = claims.get("processes", 1)
    launch = f" Run by torchrun --nproc_per_node={processes}." if processes > 1 else ""
    shows = "raises an error" if raises else f"{quantity} beside what its claimed rule gives"
    what = f"{cell.block} of {library.name}, {cell.column}: {shows}.{launch}"
    load, expression = "" if raises else _LOAD, expressions[quantity]
    text = _jax_text(code, expression) if in_jax else _torch_text(code, expression, claims, case, load)
    write_atomic(place, script(what, text))


def script(what: str, body: str) -> str:
    """A script's text: what it shows, then what it runs."""
    return f'"""{what}"""\n{body}'


def _weights(claims: Mapping[str, Any], layer: Layer) -> dict[str, np.ndarray]:
    """Weights of a layer in JAX as ``weights.NAME``, by the names that it reads."""
    arrays = {name: array for name, array in layer.weights.items() if name != "x"}
    arrays |= {} if layer.bias is None else {"bias": layer.bias}
    return {f"weights.{path}": arrays[name] for path, name in _paths(claims, arrays).items() if name in arrays}


def _paths(claims: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Name that a layer in JAX reads → name of the weight."""
    return claims["parameters"] or {name: name for name in names}


def _state(file: Path) -> dict[str, np.ndarray]:
    """Parameters and buffers of a block in PyTorch before its run, as ``state.NAME``."""
    with np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files if name.startswith("state.")}


def _in_jax(claims: Mapping[str, Any], layer: Layer) -> dict[str, str]:
    """Quantity → its expression in a script in JAX."""
    found = {"y": 'np.concatenate([jax.jit(layer)(weights, x)[0] for x in given["x"]])'}
    found["grad_x"] = f"np.concatenate([gradient(weights, *part)[1] {_PARTS}])"
    for path, name in _paths(claims, layer.weights).items():
        found[f"grad_{name}"] = f'sum(gradient(weights, *part)[0]["{path}"] {_PARTS})'
    return found


def _in_torch(claims: Mapping[str, Any], case: Case) -> dict[str, str]:
    """Quantity → its expression in a script in PyTorch."""
    losses = {"balance_loss": "loss"} if case.balance else {}
    return claims["gradients"] | {"grad_x": "parts.grad.flatten(0, 1)", "y": "y"} | losses


def _jax_text(code: str, expression: str) -> str:
    """A script in JAX."""
    gradient = _GRADIENT if "gradient(" in expression else ""
    begin = "import json\n" if "json." in code else ""
    return begin + _JAX.format(code=code, gradient=gradient, expression=expression) + _LAST


def _torch_text(code: str, expression: str, claims: Mapping[str, Any], case: Case, load: str) -> str:
    """A script in PyTorch, of one process or several."""
    spread, begin = claims.get("spread_code", "").strip(), ""
    if claims.get("processes", 1) > 1:
        begin = 'torch.distributed.init_process_group("gloo")\n'
        expression = f"getattr({expression}, 'full_tensor', lambda: {expression})()"
    backward = "(y * cotangent.flatten(0, 1)).sum().backward()\n" if "grad" in expression else ""
    if case.balance:
        backward = f"loss = balance_loss(mask[0])\n((y * cotangent[0]).sum() + {BALANCE_WEIGHT} * loss).backward()\n"
    made = {
        "begin": begin,
        "code": code.strip(),
        "load": load,
        "spread": f"{spread}\n" if spread else "",
        "run": claims["run"],
    }
    body = _TORCH.format(**made, backward=backward, expression=expression)
    body += _OF_THE_FIRST + _LAST if begin else _LAST
    used = [name for name in ("copy", "json") if f"{name}." in body]
    return f"import {', '.join([*used, 'numpy as np', 'torch'])}\n{body}"


def run(out: Path, environment: Environment, cells: Sequence[Cell]) -> dict[str, float]:
    """Run the script of each cell that deviates or raises an error, in its library's environment.

    Returns:
        block, column → the relative difference that the script printed, infinite where it raised the cell's error; NaN
        where it did neither.
    """
    shown = [cell for cell in cells if cell.status in SHOWN]
    if not shown:
        return {}
    scripts = [str(path(out, cell)) for cell in shown]
    printed = environment.run(WORKERS / "scripts.py", *scripts)
    found = {}
    for cell, script in zip(shown, scripts, strict=True):
        text = printed.split(f"{script}\n", 1)[1].split(str(out / "reproduce"), 1)[0]
        difference = _printed(cell, text)
        if math.isnan(difference):
            print(f"  {script}: {text.strip()}")
        found[f"{cell.block}, {cell.column}"] = difference
    return found


def _printed(cell: Cell, text: str) -> float:
    """Result of :func:`run` for a script that printed ``text``."""
    if cell.status == "raises":
        kind = cell.text.split(":", 1)[0]
        same = any(line.startswith(f"{kind}:") and cell.text.startswith(line) for line in text.splitlines())
        return math.inf if same else math.nan
    numbers = _PRINTED.search(text)
    return float(numbers[1]) / float(numbers[2]) if numbers else math.nan


def sentence(reproduced: Mapping[str, float]) -> str:
    """Number of cells whose script shows a difference above the tolerance, or the cell's error."""
    shown = [difference for difference in reproduced.values() if difference > TOLERANCE]
    sizes = [difference for difference in shown if math.isfinite(difference)]
    smallest = f", deviations by {min(sizes):.2g} or more" if sizes else ""
    cells = f"{len(shown)} of {len(reproduced)} cells that deviate or raise an error"
    return f"{cells} are reproduced by their script alone{smallest}"
