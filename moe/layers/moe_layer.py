"""The MoE layer: router, dispatch, experts."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from moe.config import ConfigError, ModelConfig
from moe.config.parse import layer_config
from moe.config.references import import_object
from moe.dispatch import modes
from moe.dispatch.buffers import layer_capacity, plan_assignments
from moe.dispatch.ffn import ExpertDropout, ExpertWeights
from moe.layers.call import Call, Report
from moe.layers.extras import RunExperts, Wrapped
from moe.layers.ffn import SharedExpert
from moe.layers.inputs import Rows
from moe.layers.low_rank import create_experts
from moe.layers.parameter_loss import has_parameter_loss, with_parameter_loss
from moe.layers.reporting import Reporting
from moe.layers.router import Router
from moe.layers.tokens import Keys, Tokens
from moe.routing import balancing
from moe.routing.carry import begin
from moe.routing.guarded import named_in_errors
from moe.routing.interface import Gate, GateInputs
from moe.routing.routing import Choices, Routing, route


class MoELayer(Wrapped):
    """Router, dispatch and experts with the constants of one paper's gate.

    Example::

        layer = MoELayer(d_model=512, d_ff=1024, num_experts=8, gate="mixtral", rngs=nnx.Rngs(0))
        y, report, routing = layer(x)
    """

    gate_class: ClassVar[type[Gate]] = Gate  # of the gates that the layer can have
    router_class: ClassVar[type[Router]] = Router
    #: Defaults of the settings of a stand-alone layer.
    defaults: ClassVar[Mapping[str, Any]] = types.MappingProxyType({"gate": "mixtral"})

    def __init__(
        self, config: ModelConfig | None = None, *, gate: str | Gate | None = None, rngs: nnx.Rngs, **settings: Any
    ):
        """Draw the parameters.

        Args:
            config: of a whole model, whose ``moe`` section describes the layer; None: ``settings`` do.
            gate: the gate, its name, or ``module:object``; with a config, it replaces the config's as a layer gate.
            **settings: ``d_model``, ``activation`` and ``init_scale`` of :class:`moe.config.ModelConfig`, and fields of
                :class:`moe.config.MoEConfig` such as ``d_ff``, ``num_experts`` and ``dispatch``.

        Raises:
            ConfigError: an unknown setting, or an impossible value or combination.
        """
        config = layer_config(config, gate, settings, self.defaults)
        moe = config.moe
        self.config = moe
        self.d_model = config.d_model
        if moe.gate is None:
            raise ConfigError("MoELayer: a dense model (model.moe.gate=none) has no MoE layer")
        self.gate = moe.gate
        own = layer_class(self.gate)
        if not isinstance(self, own) or not isinstance(self.gate, self.gate_class):
            raise ConfigError(f"gate={self.gate.name!r}: needs a {own.__name__}, not a {type(self).__name__}")
        kind = self.gate.router
        self.router = None if kind == "none" else self.router_class(config, kind=kind, rngs=rngs)
        self.wrap(config, rngs)
        self.experts = create_experts(config, rngs)
        self.shared = SharedExpert(config, rngs=rngs) if moe.shared_d_ff else None
        self.reporting = Reporting.of(moe, routed=self.router is not None)
        self.adds_shared = not moe.shortcut
        self.penalised = has_parameter_loss(self.gate)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[ArrayLike, "B T"] | None = None,
        *,
        routing: Routing | Choices | None = None,
        train: bool = False,
        rng: PRNGKeyArray | None = None,
        gate_inputs: Mapping[str, Any] = types.MappingProxyType({}),
        **read: Any,
    ) -> tuple[Float[Array, "B T D"], balancing.LayerReport, Routing]:
        """Apply the experts that the gate chooses for each token.

        Args:
            x: normalised activations.
            mask: real tokens; padding takes no capacity, gets 0 and counts in no loss. None: all are real.
            routing: recorded routing to replay instead of asking the router, or choices, whose weights it recomputes.
            train: use the training capacity factor and expert dropout.
            rng: key of jitter, the gate's draws, random drops and expert dropout; None: deterministic.
            gate_inputs: further fields of :class:`moe.routing.interface.GateInputs`, as they are.
            **read: fields of it that have an entry for each token, [B,T,...]: ``token_ids``, ``segment_ids``, the
                documents within rows, ``positions``, given when generating, and what the MoE layer below handed on.

        Returns:
            The output, 0 for a token whose assignments were all dropped (the residual carries it); the layer's report;
            the routing over groups.
        """
        tokens, keys = self.group(x, mask, read), Keys.split(rng)
        capacity = layer_capacity(self.config, tokens.mask.shape[1], train=train)
        tokens.check_replay(routing, self.gate)
        if not isinstance(routing, Routing):
            logits, tokens = self._logits(tokens, keys)
            inputs = self._inputs(tokens, keys, train=train, expert_capacity=capacity, **gate_inputs)
            routing = route(self.gate, logits, inputs, replay=routing)

        def experts(rows: Array, routing: Routing) -> tuple[Array, Array]:
            routing, plan = plan_assignments(self.config, routing, capacity, rng=keys.drop)
            y = modes.dispatch(self.config.dispatch, rows, routing, plan, self._experts(keys, train=train))
            return self.experts.with_output_biases(y, routing, plan.kept, rows.dtype), plan.kept

        y, report, routing = self._finish(x, tokens, routing, experts)
        return y, with_parameter_loss(self, report, keys.gate) if train and self.penalised else report, routing

    def run(self, x: Float[Array, "B T D"], call: Call) -> tuple[Float[Array, "B T D"], Report]:
        """The layer as a part of a block. Its signals are ``layers``, ``routing`` and ``input``, x."""
        rows = call.rows
        y, report, routing = self(
            x,
            self.real_tokens(rows),
            token_ids=rows.token_ids,
            positions=rows.positions if call.generating else None,
            segment_ids=rows.segment_ids,
            routing=call.replayed,
            train=call.train,
            rng=call.rng,
            gate_inputs=call.gate,
            **call.read,
        )
        losses = balancing.auxiliary_losses(report, self.config.losses)
        return y, Report(losses=losses, signals={"layers": report, "routing": routing, "input": x})

    def real_tokens(self, rows: Rows) -> Bool[Array, "B T"] | None:
        """Mask of the tokens that are routed; None: all are, padding too."""
        return None if self.config.route_padding else rows.as_keys > 0

    def group(self, x: Array, mask: ArrayLike | None, read: Mapping[str, Any]) -> Tokens:
        """Split the batch into groups; arguments are those of the call."""
        read = begin(self.gate, self.reporting.columns, read, x.shape[:2]) if self.gate.hands_on else read
        return Tokens.of(x, mask, read, group_size=self.config.group_size, d_model=self.d_model)

    def _logits(self, tokens: Tokens, keys: Keys) -> tuple[Float[Array, "G S *columns"], Tokens]:
        """Router logits, zeros without a router; and the tokens, with what the router hands on."""
        if self.router is None:
            return jnp.zeros((*tokens.mask.shape, self.reporting.columns), jnp.float32), tokens
        logits, read = self.router.logits(tokens.x, tokens.read, jitter=self.config.jitter, rng=keys.jitter)
        return logits, tokens._replace(read=read)

    def _inputs(self, tokens: Tokens, keys: Keys, **inputs: Any) -> GateInputs:
        """Inputs of the gate beside the logits; ``inputs`` are fields of them."""
        if self.router is not None:
            noise = None if keys.gate is None else self.router.noise_logits(tokens.x)
            inputs = {"noise_logits": noise, **self.router.balancing_inputs(self.gate), **inputs}
        return GateInputs(tokens.mask, rng=keys.gate, **inputs, **tokens.read)

    def _experts(self, keys: Keys, *, train: bool) -> ExpertWeights:
        """The FFN experts, with dropout in training."""
        weights, rate = self.experts.weights, self.config.expert_dropout
        if not train or keys.dropout is None or rate == 0:
            return weights
        return dataclasses.replace(weights, dropout=ExpertDropout(keys.dropout, rate))

    def _finish(
        self, x: Float[Array, "B T D"], tokens: Tokens, routing: Routing, experts: RunExperts
    ) -> tuple[Float[Array, "B T D"], balancing.LayerReport, Routing]:
        """Wrap the FFN experts and run them, add the shared expert, report."""
        # Broken tokens are zeroed as padding is.
        y, kept = self.around(experts)(jnp.where(routing.broken[..., None], 0, tokens.x), routing)
        y = tokens.ungrouped(y, x.dtype)
        beside = self.beside(x, tokens.mask.reshape(x.shape[:2])) if self.adds_shared else None
        strength = None if self.router is None else self.router.penalty(self.gate)
        report = self.reporting(tokens, routing, kept, strength)
        return y if beside is None else y + beside, report, routing.without_report_inputs()

    def beside(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None) -> Float[Array, "B T D"] | None:
        """Output of the shared expert, 0 for padding; None without one.

        Args:
            x: normalised activations.
            mask: real tokens; None: all are.
        """
        if self.shared is None:
            return None
        return self.shared(x if mask is None else jnp.where(mask[..., None], x, 0))


def layer_class(gate: Gate) -> type[MoELayer]:
    """Class of a gate's layer.

    Raises:
        ConfigError: the gate names a layer that is not an MoELayer.
    """
    own = gate.layer
    if isinstance(own, str):
        own = import_object(f"gate {type(gate).__name__}: its layer", own)
    kind = MoELayer if own is None else own
    if not (isinstance(kind, type) and issubclass(kind, MoELayer)):
        raise ConfigError(f"gate {type(gate).__name__}: its layer={kind!r}: must be a class derived from moe.MoELayer")
    return kind


def create_layer(config: ModelConfig, *, gate: Gate | None = None, rngs: nnx.Rngs) -> MoELayer:
    """Create the MoE layer for a model's gate, or for a layer's own gate; see :func:`layer_class`."""
    rule = config.moe.gate if gate is None else gate
    kind = MoELayer if rule is None else layer_class(rule)
    with named_in_errors(rule, "its layer"):
        return kind(config, gate=gate, rngs=rngs)


def replace_gate(model: nnx.Module, gate: Gate) -> None:
    """Use this gate in every MoE layer of a model, with the router parameters that the layer has."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, MoELayer):
            module.gate = gate
