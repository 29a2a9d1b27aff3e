"""Section ``model.moe``: the settings of MoE layers, and the rules across them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

from moe.config.exchange import AllGather, AllToAll
from moe.routing.balancing_rules import RunningThreshold, Threshold
from moe.routing.gates import TopK
from moe.routing.interface import BalanceCounts, BalanceScope, Gate
from moe.system.fields import ConfigError, Section, require, setting

Dispatch = Literal["gather", "einsum", "dropless"]
Exchange = Literal["all_to_all", "all_gather"]
DropPolicy = Literal["position", "probability", "random"]
MoEBias = Literal["none", "router", "all"]
DType = Literal["float32", "bfloat16"]

_MOE = "model.moe."


@dataclasses.dataclass(frozen=True)
class Capacity(Section, path=f"{_MOE}capacity."):
    """Largest number of tokens of a group that one expert takes: C = ceil(factor · K·S/E). Dropless dispatch
    uses it only where experts choose tokens."""

    train: float = setting(1.25, above=0)  # factor in training (Switch 2021)
    eval: float = setting(2.0, above=0)  # factor outside training (Switch 2021)
    fixed: int = setting(0, least=0, page=True)  # C itself, in training and outside; 0: computed from the factors


@dataclasses.dataclass(frozen=True)
class Losses(Section, path=f"{_MOE}losses."):
    """Weights of the auxiliary losses, and how the load-balancing loss is computed (moe.routing.balancing)."""

    balance: float = setting(0.0, least=0, most=1e6)  # load-balancing loss
    z: float = setting(0.0, least=0, most=1e6)  # router z-loss
    importance: float = setting(0.0, least=0, most=1e6)  # Shazeer's importance loss
    load: float = setting(0.0, least=0, most=1e6)  # Shazeer's load loss; gate noisy_topk only
    device: float = setting(0.0, least=0, most=1e6)  # balance over the gate's groups of experts
    scope: BalanceScope = "batch"  # tokens over which one load-balancing loss is computed, and step: a quantile
    counts: BalanceCounts = "assignments"  # what f of that loss counts: all, first choices, or the top K scores
    null: float = setting(1.0, least=0)  # tau, weight of experts without an FFN in that loss; below 1: used more


@dataclasses.dataclass(frozen=True)
class MoEConfig(Section, path=_MOE):
    """MoE layers: gate, experts, capacity, dispatch and losses.

    The defaults are Mixtral's layer; layers of other papers are values in :data:`moe.config.registry.LAYERS`.
    """

    gate: Gate | None = TopK(k=2, renormalise=True, name="mixtral")  # routing rule; None ("none"): all FFNs are dense
    #: gates of the first (or all) MoE layers instead of `gate` (DeepSeek-V4: hash)
    layer_gates: tuple[Gate, ...] = setting((), page=True)
    num_experts: int = setting(8, least=1, most=2**17, split="expert")  # E, without shared experts
    #: F, hidden dim of one expert; 0: model.d_ff
    d_ff: int = setting(0, least=0, most=2**22, split="tensor", follows="model.d_ff")
    #: r of experts that share their matrices but for a product of this rank, W + A_e B_e; 0: matrices of their own
    expert_rank: int = setting(0, least=0, most=2**16, page=True)
    #: hidden dim of the shared expert, which sees every token; 0: none. n experts of F equal one of n*F
    shared_d_ff: int = setting(0, least=0, most=2**22, split="tensor")
    #: of the router's logits (router), and of the experts' matrices too (all; gpt-oss)
    bias: MoEBias = setting("none", page=True)
    #: dimension of tokens inside the experts (LatentMoE); 0: model.d_model
    latent_dim: int = setting(0, least=0, split="fsdp", page=True)
    #: RMSNorm of the combined output of latent experts before it is projected back (Kimi K3)
    latent_norm: bool = setting(False, page=True)
    zero_experts: int = setting(0, least=0, page=True)  # experts that return 0 (MoE++), beside the E FFNs
    copy_experts: int = setting(0, least=0, page=True)  # experts that return the token
    constant_experts: int = setting(0, least=0, page=True)  # experts that mix the token and a learned vector
    novice_experts: int = setting(0, least=0, page=True)  # experts that return a learned vector (MoNE)
    #: the experts' output, without a shared expert's, is added after the next layer's FFN, a dense one (LongCat-Flash)
    shortcut: bool = setting(False, page=True)
    shared_gate: bool = setting(False, page=True)  # multiply the shared expert's output by sigmoid(x w) (Qwen2-MoE)
    every: int = setting(1, least=1)  # every n-th layer is MoE: layers n, 2n, ... of either stack, counted from 1
    layers: tuple[int, ...] = ()  # MoE layers, from 0, an encoder's before the decoder's; empty: every, first_dense
    first_dense: int = setting(0, least=0)  # number of leading layers that stay dense, of either stack
    #: S, tokens of a group, which share one capacity; 0: data.sequence_length. Independent of the mesh
    group_size: int = setting(0, least=0, most=2**26, unit="tokens")
    dispatch: Dispatch = "gather"  # how assignments reach their experts
    #: all_to_all: rows go to their experts; all_gather: each device gets all tokens and returns sums; dropless only
    exchange: Exchange = setting("all_to_all", resume="free")
    #: parts of a group's tokens; the exchange of one overlaps the experts of another; dropless on mesh.expert only
    exchange_chunks: int = setting(1, least=1, most=64, resume="free")
    #: hosts that mesh.expert spans; above 1 a token is sent once to each host with any of its experts; dropless only
    exchange_hosts: int = setting(1, least=1, most=2**10, resume="free")
    capacity: Capacity = Capacity()
    losses: Losses = Losses(balance=0.02)
    route_padding: bool = False  # padding is routed, takes capacity and counts in the losses (Hugging Face's Switch)
    #: multiply the router's input by U[1 - jitter, 1 + jitter] in training
    jitter: float = setting(0.0, share=True, result="training")
    #: of the router's matmul; bfloat16 only to reproduce Switch's table 2
    router_dtype: DType = setting("float32", page=True)
    router_softcap: float = setting(0.0, least=0, most=1e4, page=True)  # c: logits c·tanh(logits/c) (Laguna); 0: none
    drop_policy: DropPolicy = setting("position", page=True)  # priority of tokens when an expert's buffer overflows
    #: an overflowing assignment is retried once on the token's next-best expert
    overflow_to_next: bool = setting(False, page=True)
    #: of the experts' hidden activations (Switch: 0.4 in fine-tuning)
    expert_dropout: float = setting(0.0, share=True, result="training")
    #: allow gates whose assignments depend on later tokens
    accept_future_leak: bool = setting(False, result="none")

    def __post_init__(self) -> None:
        is_gate = self.gate is None or isinstance(self.gate, Gate)
        require(is_gate, f"{_MOE}gate", self.gate, "must be a Gate, such as TopK(k=2), or None")
        super().__post_init__()
        if self.gate is None:  # a dense model reads none of the other fields
            return
        self._require("shared_gate", self.shared_d_ff > 0 or not self.shared_gate, "needs shared_d_ff above 0")
        self._require("latent_norm", self.latent_dim > 0 or not self.latent_norm, "needs latent_dim above 0")
        alike = self.expert_rank == 0 or self.bias != "all"
        self._require("expert_rank", alike, "must be 0 with bias=all: biases are not shared")
        self.gate.check_experts(self.num_experts, self.null_experts)
        self._check_router(self.gate)
        self._check_losses(self.gate)
        self._check_drops(self.gate)
        if self.layer_gates:
            object.__setattr__(self, "layer_gates", tuple(map(self._layer_gate, self.layer_gates)))
            for gate in (*self.layer_gates, self.gate):
                self._check_layer_gate(gate)

    @property
    def null_experts(self) -> int:
        """Number of experts without an FFN, whose columns follow those of the E FFNs in the router."""
        return self.zero_experts + self.copy_experts + self.constant_experts + self.novice_experts

    @property
    def experts_per_token(self) -> int:
        """K; 0 in a dense model."""
        return 0 if self.gate is None else self.gate.experts_per_token(self.num_experts)

    @property
    def gates(self) -> tuple[Gate, ...]:
        """``gate`` and ``layer_gates``; empty in a dense model."""
        return () if self.gate is None else (self.gate, *self.layer_gates)

    def field_of(self, gate: Gate) -> str:
        """Path of the setting that names one of the gates."""
        return f"{_MOE}gate" if gate == self.gate else f"{_MOE}layer_gates"

    @property
    def ffn_share(self) -> float:
        """Share of assignments to experts with an FFN at the minimum of the balance loss: τE over τE plus the number of
        null experts (MoE++ 2024, heterogeneous balance loss); 1 with τ = 0, where the loss does not determine it."""
        if self.losses.null == 0:
            return 1.0
        weighed = self.losses.null * self.num_experts
        return weighed / (weighed + self.null_experts)

    @property
    def gate_name(self) -> str:
        """Name of the gate, for messages and records."""
        return "none" if self.gate is None else self.gate.name

    def with_gate(self, gate: Gate) -> MoEConfig:
        """The settings of a layer with this gate, one of ``layer_gates``, without the weights of losses, which the
        model applies, and without settings of the router if the gate has none."""
        if gate == self.gate:
            return self
        losses = Losses(scope=self.losses.scope, counts=self.losses.counts, null=self.losses.null)
        changed: dict[str, Any] = {"gate": gate, "layer_gates": (), "losses": losses}
        if gate.router == "none":
            bias = "none" if self.bias == "router" else self.bias
            policy = "position" if self.drop_policy == "probability" else self.drop_policy
            changed |= {"jitter": 0.0, "router_dtype": "float32", "bias": bias, "router_softcap": 0.0}
            changed |= {"drop_policy": policy, "overflow_to_next": False}
        return dataclasses.replace(self, **changed)

    def with_dispatch(self, dispatch: str) -> MoEConfig:
        """The settings with another dispatch mode; settings of the exchange are reset unless it is dropless."""
        if dispatch == "dropless":
            return dataclasses.replace(self, dispatch=dispatch)
        return dataclasses.replace(self, dispatch=dispatch, exchange="all_to_all", exchange_chunks=1, exchange_hosts=1)

    def chunks(self, tokens: int, expert_devices: int) -> int:
        """Number of parts in which a group of ``tokens`` tokens is exchanged, which divides ``tokens`` and
        ``exchange_chunks``: rows are shorter in generation. 1 where experts are not split over devices."""
        return math.gcd(self.exchange_chunks, tokens) if expert_devices > 1 else 1

    def hosts(self, expert_devices: int) -> int:
        """Number of hosts to which a token is sent once, which divides ``exchange_hosts`` and the number of devices
        that experts are split over: a run may be evaluated on a smaller mesh."""
        return math.gcd(self.exchange_hosts, expert_devices)

    def exchange_of(self, tokens: int, expert_devices: int) -> AllToAll | AllGather:
        """The exchange of a group of ``tokens`` tokens by dropless dispatch."""
        chunks = self.chunks(tokens, expert_devices)
        if expert_devices > 1 and self.exchange == "all_gather":
            return AllGather(chunks)
        return AllToAll(chunks, self.hosts(expert_devices))

    def _layer_gate(self, gate: Gate) -> Gate:
        """The gate with the K of the model."""
        with _named_in_errors(gate):
            return gate.with_k(self.experts_per_token)

    def _check_layer_gate(self, gate: Gate) -> None:
        assert self.gate is not None
        with _named_in_errors(gate):
            self.with_gate(gate)
            if gate.router != "none":  # else the layer's losses are 0
                self._check_load(gate)
        field, k = f"{_MOE}layer_gates", self.experts_per_token
        found = not gate.lists_all and gate.experts_per_token(self.num_experts) == k
        require(found, field, gate.name, f"must choose {k} experts")
        # The train step updates the states of all layers by one rule.
        rule = self.gate.balancing
        allowed = f"must have the model's balancing rule, {rule}, or none"
        allowed = "must have no balancing rule, as the model's gate" if rule is None else allowed
        require(gate.balancing in (None, rule), field, gate.name, allowed)
        same = gate.balancing == rule or not isinstance(rule, (Threshold, RunningThreshold))
        every = "must have the model's balancing rule where losses.scope is step, since its quantiles are over a step"
        require(same or self.losses.scope != "step", field, gate.name, every)

    def _check_router(self, gate: Gate) -> None:
        if gate.router == "none":
            no_router = f"the gate {gate.name!r} has no router"
            self._require("jitter", self.jitter == 0, f"must be 0: {no_router}")
            self._require("router_dtype", self.router_dtype == "float32", no_router)
            self._require("bias", self.bias != "router", no_router)
            self._require("router_softcap", self.router_softcap == 0, f"must be 0: {no_router}")
            self._require("drop_policy", self.drop_policy != "probability", f"must not be probability: {no_router}")
            self._require("overflow_to_next", not self.overflow_to_next, f"must be False: {no_router}")
        slots = gate.slots_per_expert > 0
        self._require("bias", self.bias == "none" or not slots, "must be none with the gate soft_moe")
        for name in ("train", "eval") if slots else ():
            factor = getattr(self.capacity, name)
            require(factor == 1, f"{_MOE}capacity.{name}", factor, "must be 1: soft_moe has slots instead")
        allowed = "must be einsum: soft_moe mixes all tokens into every slot and moves no single token"
        self._require("dispatch", not slots or self.dispatch == "einsum", allowed)

    def _check_losses(self, gate: Gate) -> None:
        losses, where = self.losses, f"{_MOE}losses."
        if gate.router == "none":
            for name in ("balance", "z", "importance", "device"):
                value = getattr(losses, name)
                require(value == 0, f"{where}{name}", value, f"must be 0: the gate {gate.name!r} has no router")
        constant = f"must be 0: with the gate {gate.name!r} every token goes to every expert and the loss is constant"
        require(losses.balance == 0 or not gate.sends_to_all, f"{where}balance", losses.balance, constant)
        ranked = not gate.lists_all or losses.counts == "assignments"
        no_ranks = f"must be assignments: the gate {gate.name!r} does not rank a token's experts"
        require(ranked, f"{where}counts", losses.counts, no_ranks)
        grouped = gate.expert_groups > 1
        require(grouped or losses.device == 0, f"{where}device", losses.device, "needs a gate with groups above 1")
        self._check_load(gate)
        read = self.null_experts > 0 or losses.null == 1
        require(read, f"{where}null", losses.null, "needs zero, copy, constant or novice experts")

    def _check_load(self, gate: Gate) -> None:
        if self.losses.load == 0:
            return
        field, load = f"{_MOE}losses.load", self.losses.load
        no_noise = "needs the gate noisy_topk: the load has no gradient without its noise"
        require(gate.router == "noisy", field, load, no_noise)
        allowed = "needs a gate without bias and kept_groups equal to groups: only the noise may decide who is chosen"
        require(_keeps_all_groups(gate) and gate.balancing is None, field, load, allowed)

    def _check_drops(self, gate: Gate) -> None:
        dropless, by_position = self.dispatch == "dropless", self.drop_policy == "position"
        allowed = f"must be position: the gate {gate.name!r} drops no assignment"
        self._require("drop_policy", by_position or not gate.looks_ahead, allowed)
        allowed = "must be 1 unless dispatch is dropless"
        for name in ("exchange_chunks", "exchange_hosts"):
            self._require(name, dropless or getattr(self, name) == 1, allowed)
        routed = self.exchange == "all_to_all"
        self._require("exchange", dropless or routed, "must be all_to_all unless dispatch is dropless")
        allowed = "must be 1 with exchange=all_gather, which sends a token once to each device"
        self._require("exchange_hosts", routed or self.exchange_hosts == 1, allowed)
        fixed, slots = self.capacity.fixed, gate.slots_per_expert > 0
        allowed = "needs a dispatch with a capacity (gather or einsum) and a gate other than soft_moe"
        require(fixed == 0 or not (slots or dropless), f"{_MOE}capacity.fixed", fixed, allowed)
        if not self.overflow_to_next:
            return
        enough = 2 * self.experts_per_token <= self.num_experts
        self._require(
            "overflow_to_next",
            enough and not gate.lists_all and not dropless,
            "needs num_experts at least twice the gate's k, a dispatch with a capacity (gather or einsum), and a gate "
            "in which tokens choose their experts",
        )
        one_kind = "needs experts of one kind: set zero_, copy_, constant_ and novice_experts to 0"
        self._require("overflow_to_next", self.null_experts == 0, one_kind)
        allowed = "needs kept_groups equal to groups, which a retry may leave"
        self._require("overflow_to_next", _keeps_all_groups(gate), allowed)


def _keeps_all_groups(gate: Gate) -> bool:
    return getattr(gate, "kept_groups", 1) == gate.expert_groups


@contextlib.contextmanager
def _named_in_errors(gate: Gate) -> Iterator[None]:
    """Raise errors in the settings of a layer with its own gate again, with the name of that gate."""
    try:
        yield
    except ConfigError as error:
        reason = str(error).replace(f"{_MOE}gate.", "")
        raise ConfigError(f"{_MOE}layer_gates={gate.name!r}: {reason}") from error
