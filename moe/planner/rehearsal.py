"""A pod's run at toy width: the same layers, gate, mesh axes and exchange, small enough for fake devices of one CPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe.config import Config, ConfigError, to_dict
from moe.config.parse import from_config_dict
from moe.parallel.mesh import axis_sizes
from moe.system.metrics_files import METRICS, iterate_rows

#: Widths of the toy, by dotted name; a width that is 0 in the config stays 0.
_WIDTHS = {
    "vocab_size": 512,
    "d_model": 64,
    "head_dim": 16,
    "d_ff": 64,
    "rope_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "value_dim": 16,
    "sliding_window": 16,
    "moe.d_ff": 32,
    "moe.shared_d_ff": 32,
    "moe.latent_dim": 16,
    "delta_net.key_dim": 8,
    "delta_net.value_dim": 8,
}
_BLOCKS = 4  # with the linear and the full attention of a hybrid, and layers with and without a window
_TOKENS = 32  # of a row, on each device of the context axis
#: Steps of a rehearsal, and between its checkpoints.
STEPS, SAVE_EVERY = 24, 2


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """A toy run.

    Attributes:
        config: of the toy.
        mesh: sizes of the axes, whose product is the number of fake devices.
        pod_mesh: sizes of the axes on the pod.
    """

    config: Config
    mesh: Mapping[str, int]
    pod_mesh: Mapping[str, int]

    @property
    def devices(self) -> int:
        """Number of fake devices."""
        return math.prod(self.mesh.values())

    def shrunk(self, share: float) -> Mapping[str, int]:
        """The mesh with ``data`` or ``fsdp`` halved, once or more, until it has at most this share of the devices.

        Raises:
            ConfigError: neither axis can be halved so far.
        """
        sizes = dict(self.mesh)
        while math.prod(sizes.values()) > share * self.devices:
            axis = max(("data", "fsdp"), key=lambda axis: sizes[axis])
            if sizes[axis] % 2:
                raise ConfigError(
                    f"--shrink: the rehearsal's mesh.data={self.mesh['data']} and mesh.fsdp={self.mesh['fsdp']} cannot "
                    "be halved so far; give more --devices"
                )
            sizes[axis] //= 2
        return sizes


def make(config: Config, chips: int, devices: int, dataset: Path) -> Rehearsal:
    """The rehearsal of a config on a pod.

    Args:
        config: the pod's.
        chips: of the pod.
        devices: largest number of fake devices.
        dataset: folder of text.

    Raises:
        ConfigError: the mesh does not fit the chips, or the config cannot be made small.
    """
    pod_mesh = _pod_mesh(config, chips)
    mesh = _reduced(pod_mesh, devices)
    tree = to_dict(config)
    model, moe = tree["model"], tree["model"]["moe"]
    for name, width in _WIDTHS.items():
        section, field = _place(model, name)
        section[field] = width if section[field] else section[field]
    model["num_heads"] = max(4, mesh["tensor"])
    model["num_kv_heads"] = min(model["num_kv_heads"], model["num_heads"])
    if config.model.num_kv_heads == config.model.num_heads or model["num_kv_heads"] % mesh["tensor"]:
        model["num_kv_heads"] = model["num_heads"]
    stages = mesh["pipeline"] * (config.train.pipeline_rounds if mesh["pipeline"] > 1 else 1)
    model["num_layers"] = moe["first_dense"] + moe["every"] * max(_BLOCKS // moe["every"], stages)
    moe["layers"] = tuple(layer for layer in moe["layers"] if layer < model["num_layers"])
    if model["encoder_layers"]:
        model["encoder_layers"] = 2
    moe["group_size"] = _TOKENS if mesh["context"] > 1 or moe["group_size"] else 0
    if mesh["expert"] % moe["exchange_hosts"]:
        moe["exchange_hosts"] = 1
    microbatches = max(mesh["pipeline"], min(config.train.accumulation_steps, 2))
    model |= {
        "dtype": "float32",  # so that another mesh changes no more than the last digits
        "remat": "full" if model["remat"].startswith("offload") else model["remat"],
        "rope_scaling": {"kind": "none"},
    }
    tree["data"] = {
        "dataset": str(dataset),
        "sequence_length": _TOKENS * mesh["context"],
        "heldout_rows": 8,
        "objective": tree["data"]["objective"],
    }
    rows = mesh["data"] * mesh["fsdp"] * mesh["expert"]
    tree["mesh"] = dict(mesh)
    tree["start"], tree["distill"] = {}, {}
    tree["optimizer"] |= {"memory": "device", "warmup_steps": 2, "learning_rate": 1e-3}
    tree["train"] = {
        "num_steps": STEPS,
        "batch_size": rows * microbatches,
        "accumulation_steps": microbatches,
        "pipeline_rounds": config.train.pipeline_rounds if mesh["pipeline"] > 1 else 1,
        "log_every": 1,
        "eval_every": STEPS,
        "save_every": SAVE_EVERY,
        "sample_tokens": 0,
        "host_timeout": 15,
        "writers": (),
    }
    return Rehearsal(from_config_dict(tree), mesh, pod_mesh)


def _place(model: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """The section of a dotted name, and the field."""
    section, _, field = name.rpartition(".")
    return (model[section] if section else model), field


def _pod_mesh(config: Config, chips: int) -> dict[str, int]:
    """The pod's mesh. Raises ConfigError if it does not fit the chips."""
    filled = axis_sizes(config.mesh, chips)
    if math.prod(filled.values()) != chips:
        described = ", ".join(f"mesh.{axis}={size}" for axis, size in dataclasses.asdict(config.mesh).items())
        raise ConfigError(f"{described}: the sizes must multiply to the topology's {chips} chips")
    return filled


def _reduced(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The mesh with its largest axes halved until it has at most this many devices; a split axis stays split."""
    sizes = dict(sizes)
    while math.prod(sizes.values()) > devices:
        halved = [axis for axis, size in sizes.items() if size > 2 and size % 2 == 0]
        if not halved:
            split = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1)
            raise ConfigError(f"--devices={devices}: {split} cannot be halved to so few; give more")
        sizes[max(halved, key=lambda axis: sizes[axis])] //= 2
    return sizes


#: Module of a user's gate, which a rehearsal with a skew imports: the config's own gate with pushed logits.
SKEWED_MODULE = "skewed_gate"
_SKEWED = '''"""The gate of a config, with a part of the tokens sent to the experts of the first device."""

import dataclasses

from {module} import {gate}
from moe.planner.rehearsal import pushed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skewed({gate}):
    """{gate} with pushed logits."""

    def route(self, router_logits, inputs):
        """Route by pushed logits."""
        return super().route(pushed(router_logits, {share}, {experts}), inputs)
'''


def skewed_gate(rehearsal: Rehearsal, skew: float) -> str:
    """Source of a module whose gate ``Skewed`` sends the first device on the expert axis ``skew`` times the mean rows.

    A token that is pushed sends it as many of its K assignments as it has experts; of X devices each gets 1 of X of
    all others.

    Raises:
        ConfigError: the experts are not split, or so much cannot be sent there.
    """
    moe, devices = rehearsal.config.model.moe, rehearsal.mesh["expert"]
    gate = moe.gate
    if gate is None or gate.slots_per_expert or devices == 1 or moe.layer_gates:
        raise ConfigError(
            f"--skew={skew:g}: needs one gate that assigns tokens, and mesh.expert above 1, over which rows are sent"
        )
    experts = moe.num_experts // devices
    largest = devices * min(moe.experts_per_token, experts) / moe.experts_per_token
    if not 1 <= skew <= largest:
        raise ConfigError(f"--skew={skew:g}: must be from 1 to {largest:g}, where every token is sent to one device")
    share = (skew - 1) / (largest - 1)
    kind = type(gate)
    return _SKEWED.format(module=kind.__module__, gate=kind.__qualname__, share=share, experts=experts)


def pushed(router_logits: Array, share: float, experts: int) -> Array:
    """Router logits [G,S,E] of which a share of the tokens, evenly spread, prefers the first experts to all others."""
    golden = (5**0.5 - 1) / 2  # its multiples are spread evenly
    chosen = jnp.arange(router_logits.shape[1]) * golden % 1 < share
    spread = jax.lax.stop_gradient(jnp.max(router_logits, -1) - jnp.min(router_logits, -1)) + 1
    first = jnp.arange(router_logits.shape[-1]) < experts
    return router_logits + (chosen * spread)[..., None] * first


def recorded_skew(workdir: Path, devices: int) -> float:
    """Largest load of a device over the mean, by the shares of its experts that a run logged, in the mean of its steps.

    Args:
        workdir: of the run.
        devices: over which its experts are split evenly.

    Raises:
        ConfigError: the run logged no loads, or its experts cannot be split so.
    """
    loads = [row["expert_load"] for row in iterate_rows(workdir / METRICS, "train") if row.get("expert_load")]
    if not loads or len(loads[0][0]) % devices:
        raise ConfigError(f"{workdir}: has no loads of experts that {devices} devices could hold evenly")
    mean = np.mean(np.asarray(loads), axis=0)  # [L,E]
    return float(devices * mean.reshape(len(mean), devices, -1).sum(-1).max())


@dataclasses.dataclass(frozen=True)
class Difference:
    """Losses of two runs, from the first step to the last that both have.

    Attributes:
        steps: how many both have.
        equal: how many of them, from the first on, are equal to the last bit.
        largest: largest relative difference.
    """

    steps: int
    equal: int
    largest: float


def compare(one: Path, other: Path) -> Difference:
    """Difference of the training losses of two workdirs."""
    ours, theirs = losses(one), losses(other)
    steps = min(len(ours), len(theirs))
    pairs = [(ours[step], theirs[step]) for step in range(1, steps + 1)]
    equal = next((number for number, (a, b) in enumerate(pairs) if a != b), steps)
    return Difference(steps, equal, max((abs(a - b) / abs(b) for a, b in pairs), default=0.0))


def losses(workdir: Path) -> dict[int, float]:
    """Training loss by step, as far as a run has logged it."""
    return {row["step"]: row["loss"] for row in iterate_rows(workdir / METRICS, "train")}
