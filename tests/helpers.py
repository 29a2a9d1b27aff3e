"""Small models, layers on eight devices, a reader of the collectives in a compiled program, and disks that fill."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from moe.config import MeshConfig, ModelConfig, MoEConfig, flat
from moe.config.changes import Changes
from moe.config.parse import build
from moe.config.registry import LAYERS
from moe.conformance import oracle
from moe.dispatch import quantized
from moe.layers.inputs import Rows
from moe.layers.moe_layer import MoELayer
from moe.models.factory import Model, abstract_model
from moe.models.state import TrainState
from moe.parallel import partition_specs, target
from moe.parallel.mesh import make_mesh
from moe.routing.gates import TopK
from moe.routing.interface import Gate, GateInputs
from moe.routing.routing import Routing, route
from moe.training import update
from moe.training.step import Program

_MOE_FIELDS = {field.name for field in dataclasses.fields(MoEConfig)} - {"d_ff"} | flat.PLACES.keys()


#: A case of a parametrised test that runs with the slow tests.
slow_case = functools.partial(pytest.param, marks=pytest.mark.slow)

#: The gates that the oracle (moe/conformance/reference.py) implements.
FOUR = ("dense_mixture", "gshard", "mixtral", "switch")


def trace_for_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace as for an accelerator that has none of this project's kernels."""
    monkeypatch.setattr(target, "current", lambda: target.Target("tpu", "TPU v2"))


def moe_config(**fields: Any) -> MoEConfig:
    """The MoE section with these fields, each by its name in the flat form: ``experts_per_token=2``."""
    return build(MoEConfig, flat.nested(fields) if flat.is_flat(fields) else fields, "model.moe.")


def set_moe(tree: Changes, **fields: Any) -> None:
    """Set fields of ``model.moe`` in a config tree, each by its name in the flat form."""
    named = {flat.PLACES.get(name, name): value for name, value in fields.items()}
    tree.model.moe.update_from_flattened_dict(named)


def tiny_model(**overrides: Any) -> ModelConfig:
    """A resolved model whose dims all differ, so that no axis can be mistaken for another.

    Fields of the MoE section have their names in the flat form, except the experts' hidden dim: ``moe_d_ff``.
    """
    moe = {"num_experts": 4, "d_ff": overrides.pop("moe_d_ff", 20)}
    moe |= {name: overrides.pop(name) for name in tuple(overrides) if name in _MOE_FIELDS}
    model = {
        "vocab_size": 48,
        "d_model": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "d_ff": 28,
    } | overrides
    return ModelConfig(moe=moe_config(**moe), **model)


def tiny_encoder_decoder(**overrides: Any) -> ModelConfig:
    """:func:`tiny_model` with T5's blocks: three encoder and two decoder layers, every second one of a stack
    Switch's."""
    layers = {"encoder_layers": 3, "num_layers": 2, "gate": "switch", "every": 2, "activation": "relu", "jitter": 0.0}
    blocks = {"relative_buckets": 8, "relative_max_distance": 9, "norm_eps": 1e-6}
    return tiny_model(**{**layers, **blocks, "scale_logits": True, "tie_embeddings": True, **overrides})


def random_parameters(config: ModelConfig) -> tuple[Any, Any]:
    """(graphdef, variables as a nested dict) of a model, drawn by NumPy: compiling its own init takes seconds.

    Matrices have standard deviation 1/4, as for a fan-in of 16; norm scales vary around 1, so that omitting one shows.
    """
    graphdef, state = nnx.split(abstract_model(config))
    generator = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        scale = path[-1].key == "scale"
        return jnp.asarray((1.0 if scale else 0.0) + 0.25 * generator.normal(size=leaf.shape), leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state))


def random_state(program: Program) -> TrainState:
    """A program's state at step 0, parameters drawn by NumPy and all else zeros, without compiling the program's
    init."""
    generator = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = np.zeros(leaf.shape)
        if path[0].name in ("parameters", "base"):
            values = 0.25 * generator.normal(size=leaf.shape) + (path[-1].key == "scale")
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, program.state)


def step_gradients(program: Program, seed: int = 1) -> Any:
    """Jitted function of a state and a batch: ((loss, (cross-entropy, terms), reports), gradients) of a train step."""
    config = program.config
    parts = update.Parts(config, program.graphdef, program.graphdef, None, None, config.objective)
    return jax.jit(lambda state, batch: update._gradients(parts, state, batch, jax.random.key(seed), None))


def random_model(config: ModelConfig) -> Model:
    """A model with the parameters of :func:`random_parameters`."""
    return nnx.merge(*random_parameters(config))


def gate_named(name: str, k: int | None = None, **fields: Any) -> Gate:
    """The gate of a paper's layer with K and other fields replaced; DeepSeek-V3's groups are off unless given."""
    gate = LAYERS[name].gate
    own = {field.name for field in dataclasses.fields(gate)}
    if "groups" in own and fields.get("groups", 1) == 1:
        fields = {"groups": 1, "kept_groups": 1, "scores_per_group": 1} | fields
    if k and "k" in own:
        fields["k"] = k
    if k == 1 and isinstance(gate, TopK):  # the only weight would always be 1
        fields.setdefault("renormalise", False)
    return dataclasses.replace(gate, **fields)


def outputs(layer: MoELayer) -> Any:
    """Jitted call of a layer that returns y and the routing, without the report, which is half of the program."""
    return jax.jit(lambda *args, **named: layer(*args, **named)[::2])


def eight_devices_equal_one(layer: MoELayer, rng: np.random.Generator) -> Any:
    """Assert that a layer of D = 8 has on eight devices the output, gradients and report of a training step that it has
    on one, to 2e-6 of each array's largest number or of 1; return those of one device."""
    run = oracle.program(layer, train=True)
    x = jnp.asarray(rng.normal(size=(8, 6, 8)), jnp.float32)
    mask, cotangent = rng.random((8, 6)) >= 0.2, rng.normal(size=x.shape).astype(np.float32)
    alone = run(x, mask, cotangent)
    with jax.set_mesh(mesh := make_mesh(MeshConfig(data=1, fsdp=2, expert=4))):
        spread = run(jax.device_put(x, partition_specs.shardings(mesh, partition_specs.BATCH)), mask, cotangent)
    expected = dict(jax.tree_util.tree_leaves_with_path(alone))
    found = dict(jax.tree_util.tree_leaves_with_path(spread))
    assert found.keys() == expected.keys()
    for path, array in found.items():
        largest = max(1, np.abs(expected[path]).max())
        np.testing.assert_allclose(array, expected[path], rtol=0, atol=2e-6 * largest, err_msg=str(path))
    return alone


@functools.partial(jax.jit, static_argnames=("gate", "fixed"))
def _route(gate, logits, mask, arrays, replay, fixed):
    return route(gate, logits, GateInputs(mask, **arrays, **dict(fixed)), replay=replay)


def routed(gate: str, logits: Any, k: int | None = None, mask: Any = None, replay: Any = None, **given: Any) -> Routing:
    """route() on logits [G,S,E]; by default all tokens are real and K is the gate's.

    ``given``: fields of the gate, and inputs of the call. Jitted: run eagerly, a gate compiles thirty programs.
    """
    logits = jnp.asarray(logits, jnp.float32)
    mask = np.ones(logits.shape[:2], bool) if mask is None else np.asarray(mask)
    own = {field.name for field in dataclasses.fields(LAYERS[gate].gate)}
    fields = {name: given.pop(name) for name in own & set(given)}
    fixed = {name: given.pop(name) for name in ("train", "expert_capacity") if name in given}
    return _route(gate_named(gate, k, **fields), logits, mask, given, replay, fixed=tuple(fixed.items()))


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction of compiled HLO.

    Attributes:
        kind: all-to-all, all-gather, all-reduce, reduce-scatter, collective-permute or collective-broadcast.
        shapes: of its results, one device's share.
        groups: of devices that exchange, None for a collective-permute.
        text: the instruction.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    groups: frozenset[frozenset[int]] | None
    text: str


_KINDS = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute|collective-broadcast|ragged-all-to-all"


def collectives(hlo: str, num_devices: int) -> list[Collective]:
    """The collectives in the text of a compiled program; one inside a loop counts once."""
    found = []
    for line in hlo.splitlines():
        match = re.search(rf"= (.*?) ({_KINDS})(?:-start)?\(", line)
        if match:
            results, kind = match.groups()
            shapes = tuple(
                tuple(int(size) for size in dims.split(",") if size) for dims in re.findall(r"\w+\[([\d,]*)\]", results)
            )
            groups = None if kind == "collective-permute" else _groups(line, num_devices)
            found.append(Collective(kind, shapes, groups, line.strip()))
    return found


def _groups(line: str, num_devices: int) -> frozenset[frozenset[int]]:
    """Groups of devices in any of XLA's three notations: a mesh and its axes, a transposed iota, a list."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    explicit = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", line)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'(\w+)'", mesh[2])
        assert mesh[2] == ",".join(f"'{axis}'" for axis in axes), f"unknown replica groups: {line}"
        moved = np.arange(num_devices).reshape(tuple(sizes.values()))
        positions = [list(sizes).index(axis) for axis in axes]
        table = np.moveaxis(moved, positions, range(-len(axes), 0))
        table = table.reshape(-1, int(np.prod([sizes[axis] for axis in axes])))
    elif iota:
        shape, dims = ([int(size) for size in text.split(",")] for text in iota.group(1, 2))
        order = [int(axis) for axis in iota[3].split(",")] if iota[3] else range(len(dims))
        table = np.arange(num_devices).reshape(dims).transpose(order).reshape(shape)
    else:
        assert explicit, f"unknown replica groups: {line}"
        table = [[int(device) for device in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", explicit[1])]
        table = table or [range(num_devices)]
    return frozenset(frozenset(int(device) for device in group) for group in table)


def axis_groups(mesh: jax.sharding.Mesh, *axes: str) -> frozenset[frozenset[int]]:
    """The groups of devices that differ only along these axes, as positions in the mesh."""
    positions = [mesh.axis_names.index(axis) for axis in axes]
    ids = np.moveaxis(np.arange(mesh.size).reshape(mesh.devices.shape), positions, range(-len(axes), 0))
    rows = ids.reshape(-1, int(np.prod([mesh.shape[axis] for axis in axes])))
    return frozenset(frozenset(int(device) for device in row) for row in rows)


@contextlib.contextmanager
def mounted(path: Path, *options: str):
    """Mount a separate file system, or skip the test if this process may not mount one."""
    path.mkdir()
    result = subprocess.run(["mount", *options, str(path)], capture_output=True, check=False)
    if result.returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def rounded(array: Any, axis: int, precision: str) -> np.ndarray:
    """Quantise numbers along an axis and dequantise them."""
    values, scales = quantized.quantize(jnp.asarray(array), axis, precision)
    return np.asarray(values.astype(jnp.float32)) * np.asarray(scales)


@contextlib.contextmanager
def fill_disk(files: int):
    """Leave the disk room for this many more files of ``write_atomic``."""
    left = iter(range(files))

    def fsync(_: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


def mixed(block: Any, x: Array, rows: Rows) -> Array:
    """x plus the output of a block's attention, whose norm comes before."""
    h = block.attention_norm(x)
    return x + block.attention.join(block.attention.prefill(h, rows)[0], h)
