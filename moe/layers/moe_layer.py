"""The MoE layer: router, dispatch, experts."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moe.config import ConfigError, ModelConfig
from moe.config.parse import layer_config
from moe.config.references import import_object
from moe.dispatch import modes
from moe.dispatch.buffers import layer_capacity, plan_assignments
from moe.dispatch.ffn import ExpertDropout, ExpertWeights
from moe.layers.call import Call, Report
from moe.layers.extras import Latent, NullExperts, RunExperts, Wrapper
from moe.layers.ffn import Experts, SharedExpert
from moe.layers.inputs import Rows
from moe.layers.low_rank import LowRankExperts
from moe.layers.router import Router
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.parameters import gather_for_matmul
from moe.routing import balancing
from moe.routing.balancing_rules import BalancingRule, restored
from moe.routing.carry import first_carry, of_tokens, regrouped
from moe.routing.gate_values import GateInputs
from moe.routing.guarded import named_in_errors
from moe.routing.interface import Gate
from moe.routing.routing import Choices, Routing, route


class Keys(NamedTuple):
    """A key for each kind of noise; None: deterministic."""

    jitter: PRNGKeyArray | None = None
    gate: PRNGKeyArray | None = None
    drop: PRNGKeyArray | None = None
    dropout: PRNGKeyArray | None = None

    @classmethod
    def split(cls, rng: PRNGKeyArray | None) -> Keys:
        """Keys of a layer's key."""
        return cls() if rng is None else cls(*jax.random.split(rng, 4))


class Tokens(NamedTuple):
    """Tokens in groups: activations [G,S,D], real tokens [G,S], and what some gates read, [G,S]; ``carry`` is a pytree
    of [G,S,...]."""

    x: Array
    mask: Array
    token_ids: Array | None
    positions: Array | None
    segment_ids: Array | None
    carry: Any = None


class MoELayer(nnx.Module):
    """Router, dispatch and experts with the constants of one paper's gate.

    Example::

        layer = MoELayer(d_model=512, d_ff=1024, num_experts=8, gate="mixtral", rngs=nnx.Rngs(0))
        y, report, routing = layer(x)
    """

    gate_class: ClassVar[type[Gate]] = Gate  # of the gates that the layer can have
    router_class: ClassVar[type[Router]] = Router
    #: Parts around the FFN experts that the config may ask for, the innermost first.
    wrappers: ClassVar[tuple[type[Wrapper], ...]] = (Latent, NullExperts)
    #: Defaults of the settings of a stand-alone layer.
    defaults: ClassVar[Mapping[str, Any]] = types.MappingProxyType({"gate": "mixtral"})

    latent: Latent | None
    null: NullExperts | None

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
        for wrapper in self.wrappers:
            setattr(self, wrapper.name, wrapper(config, rngs=rngs) if wrapper.is_in(moe) else None)
        self.experts = (LowRankExperts if moe.expert_rank else Experts)(config, rngs=rngs)
        self.shared = SharedExpert(config, rngs=rngs) if config.moe.shared_d_ff else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[ArrayLike, "B T"] | None = None,
        *,
        token_ids: Int[ArrayLike, "B T"] | None = None,
        positions: Int[ArrayLike, "B T"] | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        carry: Any = None,
        prompt: Any = None,
        routing: Routing | Choices | None = None,
        train: bool = False,
        rng: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T D"], balancing.LayerReport, Routing]:
        """Apply the experts that the gate chooses for each token.

        Args:
            x: normalised activations.
            mask: real tokens; padding takes no capacity, gets 0 and counts in no loss. None: all are real.
            token_ids: for gates that route by token id.
            positions: of the tokens in their texts, given when generating: no row's routing then depends on the others.
            segment_ids: the document of each token within its row, for gates that read it; 0 is padding.
            carry: pytree of [B,T,...] that the MoE layer below handed on; None: the gate's ``first_carry``.
            prompt: what the gate keeps of the prompt before these tokens; None: nothing (``Gate.of_prompt``).
            routing: recorded routing to replay instead of asking the router, or choices, whose weights it recomputes.
            train: use the training capacity factor and expert dropout.
            rng: key of jitter, the gate's draws, random drops and expert dropout; None: deterministic.

        Returns:
            The output, 0 for a token whose assignments were all dropped (the residual carries it); the layer's report;
            the routing over groups, whose ``carry`` the layer hands on.
        """
        tokens, keys = self._group(x, mask, token_ids, positions, segment_ids, carry=carry), Keys.split(rng)
        capacity = layer_capacity(self.config, tokens.mask.shape[1], train=train)
        self._check_replay(routing, tokens)
        if not isinstance(routing, Routing):
            logits, tokens = self._logits(tokens, keys)
            inputs = self._inputs(tokens, keys, prompt=prompt, train=train, expert_capacity=capacity)
            routing = route(self.gate, logits, inputs, replay=routing)

        def experts(rows: Array, routing: Routing) -> tuple[Array, Array]:
            routing, plan = plan_assignments(self.config, routing, capacity, rng=keys.drop)
            y = modes.dispatch(self.config.dispatch, rows, routing, plan, self._experts(keys, train=train))
            return self._add_output_biases(y, routing, plan.kept, rows.dtype), plan.kept

        y, report, routing = self._finish(x, tokens, routing, experts)
        return y, self._with_parameter_loss(report, keys.gate) if train else report, routing

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
            **call.gate,
        )
        losses = balancing.auxiliary_losses(report, self.config.losses)
        return y, Report(losses=losses, signals={"layers": report, "routing": routing, "input": x})

    def real_tokens(self, rows: Rows) -> Bool[Array, "B T"] | None:
        """Mask of the tokens that are routed; None: all are, padding too."""
        return None if self.config.route_padding else rows.as_keys > 0

    def _with_parameter_loss(self, report: balancing.LayerReport, rng: Array | None) -> balancing.LayerReport:
        """The report with the gate's loss of the parameters, if it has one; latent experts see W_g projected, and the
        columns of experts without an FFN, which have no matrices, are left out."""
        if self.router is None or type(self.gate).parameter_loss is Gate.parameter_loss:
            return report
        columns = self.router.kernel[:, : self.config.num_experts]
        columns = columns if self.latent is None else self.latent.down[...].T @ columns
        matrices = self.experts.matrices("up" if self.experts.gate is None else "gate")
        assert matrices is not None
        loss = self.gate.parameter_loss(columns, matrices, rng)
        return report if loss is None else dataclasses.replace(report, sparsity_penalty=report.sparsity_penalty + loss)

    def _group(self, x: Array, mask: ArrayLike | None, *read: ArrayLike | None, carry: Any = None) -> Tokens:
        """Split the batch into groups, runs of S tokens in row order, whatever the mesh."""
        size = self.config.group_size or x.shape[1]
        if x.ndim != 3 or x.shape[2] != self.d_model:
            raise ValueError(f"x of shape {x.shape}: must be [batch, sequence, d_model={self.d_model}]")
        if x.shape[0] * x.shape[1] % size:
            raise ValueError(f"group_size={size}: must divide the {x.shape[0]} x {x.shape[1]} tokens of x")
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
        mask = jnp.asarray(mask).reshape(-1, size)
        grouped = constrain(x.reshape(-1, size, x.shape[-1]), partition_specs.GROUPS)
        # Zeroed, since a NaN in padding would reach others even through a weight or a gradient of 0.
        grouped = jnp.where(mask[..., None], grouped, 0)
        columns = (None if array is None else jnp.asarray(array).reshape(-1, size) for array in read)
        if carry is None and self.gate.hands_on:
            carry = of_tokens(first_carry([self.gate], self._num_columns), mask.shape)
        return Tokens(grouped, mask, *columns, carry=None if carry is None else regrouped(carry, mask.shape))

    @property
    def _num_columns(self) -> int:
        return self.config.num_experts + self.config.null_experts

    def _logits(self, tokens: Tokens, keys: Keys) -> tuple[Float[Array, "G S *columns"], Tokens]:
        """Router logits, zeros without a router; and the tokens, with what the router hands on."""
        if self.router is None:
            return jnp.zeros((*tokens.mask.shape, self._num_columns), jnp.float32), tokens
        carry = {} if tokens.carry is None else {"carry": tokens.carry}
        output = self.router(tokens.x, jitter=self.config.jitter, rng=keys.jitter, **carry)
        return (output[0], tokens._replace(carry=output[1])) if isinstance(output, tuple) else (output, tokens)

    def _inputs(
        self, tokens: Tokens, keys: Keys, *, prompt: Any = None, train: bool, expert_capacity: int = 0
    ) -> GateInputs:
        """Inputs of the gate beside the logits."""
        router = self.router
        rule = self._rule
        state = self._state()
        return GateInputs(
            tokens.mask,
            rng=keys.gate,
            train=train,
            expert_capacity=expert_capacity,
            noise_logits=None if router is None or keys.gate is None else router.noise_logits(tokens.x),
            selection_bias=None if rule is None or state is None else rule.selection_bias(state),
            state=state,
            token_ids=tokens.token_ids,
            positions=tokens.positions,
            segment_ids=tokens.segment_ids,
            carry=tokens.carry,
            prompt=prompt,
        )

    @property
    def _rule(self) -> BalancingRule | None:
        return None if self.config.gate is None else self.config.gate.balancing

    def _state(self) -> Any:
        """State of the balancing rule; None without one."""
        kept = None if self.router is None else self.router.bias
        if kept is None or self._rule is None:
            return None
        return restored(self._rule, {k: v[...] for k, v in kept.items()} if isinstance(kept, nnx.Dict) else kept[...])

    def _experts(self, keys: Keys, *, train: bool) -> ExpertWeights:
        """The FFN experts, with dropout in training."""
        weights, rate = self.experts.weights, self.config.expert_dropout
        if not train or keys.dropout is None or rate == 0:
            return weights
        return dataclasses.replace(weights, dropout=ExpertDropout(keys.dropout, rate))

    def _finish(
        self, x: Float[Array, "B T D"], tokens: Tokens, routing: Routing, experts: RunExperts
    ) -> tuple[Float[Array, "B T D"], balancing.LayerReport, Routing]:
        """Wrap the FFN experts and run them, add the shared expert unless there is a shortcut, report."""
        for part in (getattr(self, wrapper.name) for wrapper in self.wrappers):
            experts = experts if part is None else part.around(experts)
        y, kept = experts(jnp.where(routing.broken[..., None], 0, tokens.x), routing)  # zeroed as padding is
        y = constrain(y.astype(x.dtype).reshape(x.shape), partition_specs.BATCH)
        beside = None if self.config.shortcut else self.beside(x, tokens.mask.reshape(x.shape[:2]))
        y = y if beside is None else y + beside
        report = self._report(routing, tokens.mask, kept, rows=x.shape[0])
        return y, report, dataclasses.replace(routing, smooth_load=None, needed_bias=None)

    def beside(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None) -> Float[Array, "B T D"] | None:
        """Output of the shared expert, 0 for padding; None without one.

        Args:
            x: normalised activations.
            mask: real tokens; None: all are.
        """
        if self.shared is None:
            return None
        return self.shared(x if mask is None else jnp.where(mask[..., None], x, 0))

    def _check_replay(self, routing: Routing | Choices | None, tokens: Tokens) -> None:
        if routing is None:
            return
        if isinstance(routing, Choices) and not self.gate.reweighs:
            raise ValueError(f"choices cannot be replayed: the gate {self.gate.name!r} weighs only its own choices")
        if routing.chosen.shape[:2] != tokens.mask.shape:
            raise ValueError(
                f"a routing of {routing.chosen.shape[:2]} groups and tokens cannot be replayed here: "
                f"groups and tokens are {tokens.mask.shape}"
            )

    def _add_output_biases(
        self, y: Float[Array, "G S D"], routing: Routing, kept: Bool[Array, "G S K"], dtype: Any
    ) -> Float[Array, "G S D"]:
        """Add the weighted sum of the output biases of each token's experts, cast to this dtype, in float32."""
        biases = self.experts.down_bias
        if biases is None:
            return y
        choices = jax.nn.one_hot(routing.expert_index, biases.shape[0], dtype=jnp.float32)  # [G,S,K,E]
        weights = jnp.einsum("gsk,gske->gse", jnp.where(kept, routing.combine_weights, 0), choices)
        # Cast while gathering: XLA would gather an array that is not cast where the scan slices it, outside its scope.
        return y + weights @ gather_for_matmul(biases, dtype)

    def _report(
        self, routing: Routing, mask: Bool[Array, "G S"], kept: Bool[Array, "G S K"], *, rows: int
    ) -> balancing.LayerReport:
        parts = {"batch": 1, "step": 1, "group": mask.shape[0], "sequence": rows}[self.config.losses.scope]
        router = self.router
        rule = self._rule
        state = self._state()
        moe, gate = self.config, self.config.gate
        groups = 1 if gate is None else gate.expert_groups
        report = balancing.report(
            routing,
            mask,
            kept,
            counts=moe.losses.counts,
            parts=parts,
            k=None if self.gate.experts_choose else moe.experts_per_token,  # None: the measured mean
            null_experts=moe.null_experts,
            keeps_needed=moe.losses.scope == "step",
            weights=balancing.balance_weights(moe.num_experts, moe.null_experts, moe.losses.null),
            expert_groups=groups,
            strength=None if rule is None or state is None else rule.penalty(state),
        )
        # Constant losses are set to 0, as a model whose other layers have other gates must not count them: the device
        # loss over a single group of experts, and all losses of a layer without a router.
        if router is not None:
            return report if groups > 1 else dataclasses.replace(report, device_balance_loss=jnp.zeros(()))
        sums = dataclasses.replace(report.sums, counts=0 * report.sums.counts, probs=0 * report.sums.probs)
        return dataclasses.replace(report, sums=sums, **dict.fromkeys(balancing.AUXILIARY, jnp.zeros(())))


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
