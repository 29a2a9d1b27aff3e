"""Run a JAX library's MoE blocks on prepared cases; runs in the library's own environment, without this project.

The command line is that of ``jobs.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jobs import Arrays, run, start

#: E, D, F of every case.
NUM_EXPERTS = 8
D = 16
F = 24
#: Arrays of a case that are not differentiated.
FIXED = ("x", "mask", "cotangent", "bias")


@dataclasses.dataclass(kw_only=True)
class Block:
    """One block of a library; the fields are those of ``torch_blocks.Block``.

    Attributes:
        text: lines, after imports of jax, numpy as np and json, that define ``layer(weights, x, mask=None)`` with the
            library alone, in which K is the number of experts per token, and ``mesh`` if it is to run on one. It
            returns y [G,S,D], and ``expert_index``, ``combine_weights``, ``balance_loss`` and ``z_loss`` by name.
            weights: router [D,E], gate and up [E,D,F], down [E,F,D], bias [E].
        settings: text, or texts, that the lines read from ``given["settings"]``.
        parameters: path → which of these weights it is, where ``layer`` takes them by their paths in the library.
    """

    text: str
    settings: str | list[str] = ""
    parameters: dict[str, str] = dataclasses.field(default_factory=dict)
    rule: dict[str, Any] = dataclasses.field(default_factory=dict)
    bias: bool = False
    biases: bool = False
    k: int = 2
    documented: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: str = ""
    read: str = ""
    skip: dict[str, str] = dataclasses.field(default_factory=dict)
    has_balance: bool = False
    has_z: bool = False

    def given(self, k: int) -> str | list[str]:
        """The settings, with K."""
        texts = [self.settings] if isinstance(self.settings, str) else self.settings
        named = [text.replace('"K"', str(k)) for text in texts]
        return named[0] if isinstance(self.settings, str) else named

    def code(self, k: int) -> str:
        """Lines that define the layer."""
        return re.sub(r"\bK\b", str(k), self.text.strip())

    def named(self, weights: Any) -> Any:
        """Weights as the layer takes them."""
        if not self.parameters:
            return weights
        return {path: weights[name] for path, name in self.parameters.items() if name in weights}

    def losses(self, k: int) -> str:
        """Nothing: the layer returns its losses."""
        return ""

    def claims(self) -> dict[str, Any]:
        """Claims of the block, as JSON."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "text"]
        return {name: getattr(self, name) for name in names} | {"gradients": {}, "run": "", "framework": "jax"}


def measure(adapter: Block, job: dict[str, Any], arrays: Arrays) -> Arrays:
    """Results of a block on a case."""
    scope = start(adapter, job, jax=jax)
    dtype = jnp.dtype(job["dtype"])
    weights = {name: jnp.asarray(array, dtype) for name, array in arrays.items() if name not in FIXED}
    fixed = {"bias": jnp.asarray(arrays["bias"], jnp.float32)} if "bias" in arrays else {}
    x = jnp.asarray(arrays["x"], dtype)
    mask = arrays["mask"]
    cotangent = arrays["cotangent"]

    def objective(weights: Any, x: Any, rows: slice) -> tuple[Any, Any]:
        y, further = scope["layer"](adapter.named(weights | fixed), x, mask[rows])
        total = jnp.sum(y.astype(jnp.float32) * mask[rows, :, None] * cotangent[rows])
        total += job["balance"] * further.get("balance_loss", 0.0) + job["z"] * further.get("z_loss", 0.0)
        return total, {"y": y, **further}

    found: list[Any] = []
    gradients: Any = None
    for rows in np.split(np.arange(len(x)), job["parts"]):
        part = slice(rows[0], rows[-1] + 1)
        with jax.set_mesh(scope["mesh"]) if "mesh" in scope else contextlib.nullcontext():
            if job["forward_only"]:
                found.append(jax.jit(lambda w, x, part=part: objective(w, x, part)[1])(weights, x[part]))
                continue
            run = jax.jit(jax.grad(lambda w, x, part=part: objective(w, x, part), argnums=(0, 1), has_aux=True))
            (of_weights, of_x), results = jax.device_get(run(weights, x[part]))
        found.append(results)
        gradients = of_weights if gradients is None else jax.tree.map(jnp.add, gradients, of_weights)
        found[-1]["grad_x"] = of_x
    shared = {"balance_loss": job["balance"], "z_loss": job["z"]}
    names = [name for name in found[0] if shared.get(name, True)]
    results = {name: found[0][name] if name in shared else jnp.concatenate([p[name] for p in found]) for name in names}
    if gradients is not None:
        results |= {f"grad_{name}": value for name, value in gradients.items()}
    return {name: np.asarray(value, np.float64) for name, value in results.items()}


def main(version: str, adapters: dict[str, Block]) -> None:
    """The program of a library's worker."""
    run(f"{version}, jax {jax.__version__}", adapters, measure)
