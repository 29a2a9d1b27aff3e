"""This package's own layers on meshes of two to four fake devices."""

from __future__ import annotations

import importlib.metadata

from jax_blocks import main
from own_blocks import own

MESHES = ("data=2", "expert=2", "tensor=2", "tensor=4", "expert=2, tensor=2", "data=2, tensor=2")
ADAPTERS = {
    f"{name}, {mode}, {mesh}": own(name, mode, mesh=mesh)
    for name, mode in (("switch, K = 2", "gather"), ("mixtral", "dropless"), ("deepseek_v3", "einsum"))
    for mesh in MESHES
}

if __name__ == "__main__":
    main(f"moe-jax {importlib.metadata.version('moe-jax')}", ADAPTERS)
