"""Optimizers from Optax, with clipping, masked weight decay and frozen parameters, and learning-rate schedules."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from moe.config import ConfigError, ModelConfig, OptimizerConfig
from moe.config.references import import_object
from moe.layers.call import Report
from moe.models.segments import part_of
from moe.system.fields import raised_as_errors
from moe.training import host_memory, qk_clip, spikes
from moe.training.rates import gains, is_matrix, matrix_axes, rates
from moe.training.skipping import follow_steps, skip_not_finite


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The schedule that ``config.schedule`` names, for a run of ``num_steps``."""
    return SCHEDULES[config.schedule](config, num_steps)


def _cosine(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Cosine decay to the final fraction at num_steps."""
    return optax.warmup_cosine_decay_schedule(
        init_value=_first(config),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=num_steps,
        end_value=config.learning_rate * config.final_learning_rate_fraction,
    )


def _constant(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The peak to the end."""
    del num_steps
    return optax.linear_schedule(_first(config), config.learning_rate, config.warmup_steps)


def _warmup_stable_decay(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The peak, then a linear decay to the final fraction over the last decay_steps (Hu et al. 2024, MiniCPM)."""
    decay = config.wsd_steps(num_steps)
    end = config.learning_rate * config.final_learning_rate_fraction
    down = optax.linear_schedule(config.learning_rate, end, decay)
    # Steps count from 0: the last one is step num_steps - 1, the decay's number decay - 1.
    return optax.join_schedules([_constant(config, num_steps), lambda step: down(step + 1)], [num_steps - decay])


def _rsqrt(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """peak·√(w / max(step, w)), independent of num_steps: the peak for w warm-up steps without a linear start, as in T5
    (2020, section 3.1.2), Switch and GShard (``learning_rate_schedule_noam`` of Mesh TensorFlow, Lingvo's SqrtDecay).
    """
    del num_steps
    warmup = max(config.warmup_steps, 1)
    return lambda step: config.learning_rate * jnp.sqrt(warmup / jnp.maximum(step, warmup))


def _first(config: OptimizerConfig) -> float:
    """Learning rate of the first step: not 0, which would waste it."""
    return config.learning_rate / (config.warmup_steps + 1)


#: One entry per name in moe.config.run_sections.Schedule.
SCHEDULES: dict[str, Callable[[OptimizerConfig, int], optax.Schedule]] = {
    "cosine": _cosine,
    "constant": _constant,
    "wsd": _warmup_stable_decay,
    "rsqrt": _rsqrt,
}


#: (config, learning-rate schedule) → gradient transformation that includes weight decay and learning rate.
Factory = Callable[[OptimizerConfig, optax.Schedule], optax.GradientTransformation]


def make_optimizer(
    config: OptimizerConfig, num_steps: int, model: ModelConfig | None = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that ``config.name`` names; its ``update`` takes ``norm=``, the result of :func:`gradient_norm`,
    and with ``qk_clip`` also ``report=`` (:func:`moe.training.qk_clip.qk_clip`). :func:`in_steps` is what trains.

    Args:
        model: whose parameters get individual rates if it has a base model's sizes, and whose heads are clipped; None:
            one rate for all, and no clipping of heads.

    Raises:
        ConfigError: no such optimizer, or a user's function that does not return one.
    """
    schedule = learning_rate_schedule(config, num_steps)
    if model is not None and model.has_base:
        optimizer = _transferred(config, schedule, model)
    else:
        optimizer = _named(config, schedule)
    for link in LINKS:
        if link.is_in(config):
            optimizer = link.around(optimizer, config, model)
    return optax.with_extra_args_support(optimizer)


def in_steps(
    config: OptimizerConfig, optimizer: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of :func:`make_optimizer` in a train step, which applies an update or skips it.

    Its ``update`` takes ``step=``, ``loss=``, ``norm=`` and ``report=``; the state that this returns is an
    :class:`~moe.training.skipping.Outcome`.
    """
    for link in STEP_LINKS:
        if link.is_in(config):
            optimizer = link.around(optimizer, config, None)
    return optimizer


def signals(config: OptimizerConfig) -> tuple[str, ...]:
    """Names of the layers' signals that links read."""
    return tuple(link.signal for link in LINKS if link.signal and link.is_in(config))


def signal_shapes(config: OptimizerConfig, model: ModelConfig) -> Report:
    """Report with the shapes of the signals that links read."""
    return Report(signals={link.signal: link.shape(model) for link in LINKS if link.shape and link.is_in(config)})


def link_metrics(config: OptimizerConfig, report: Report) -> dict[str, Array]:
    """Metrics of the links of a step, by name."""
    found = (link.metrics(config, report) for link in LINKS if link.metrics and link.is_in(config))
    return {name: value for metrics in found for name, value in metrics.items()}


def _stored_in(dtype: jnp.dtype, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer with the per-parameter arrays of its state stored in another dtype; it computes in float32
    (DeepSeek-V3, section 3.3.3: both moments of AdamW in bfloat16)."""

    def cast(state: Any, old: Any, new: Any) -> Any:
        def leaf(path: Any, array: Any) -> Any:
            of_parameter = isinstance(path[-1], jax.tree_util.DictKey) and array.ndim
            return array.astype(new) if of_parameter and array.dtype == old else array

        return jax.tree_util.tree_map_with_path(leaf, state)

    def init(params: Any) -> Any:
        return cast(optimizer.init(params), jnp.float32, dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, cast(state, dtype, jnp.float32), params)
        return updates, cast(state, jnp.float32, dtype)

    return optax.GradientTransformation(init, update)


def _transferred(config: OptimizerConfig, schedule: optax.Schedule, model: ModelConfig) -> optax.GradientTransformation:
    """The optimizer with a factor on each parameter's update, and one on its gradient, which in effect divides epsilon.

    Weight decay has no factor: muP multiplies it by the divisor of the rate (:mod:`moe.training.rates`).
    """
    optimizer = _named(dataclasses.replace(config, weight_decay=0.0), schedule)
    decay = optax.chain(
        optax.add_decayed_weights(config.weight_decay, decay_mask), optax.scale_by_learning_rate(schedule)
    )

    def times(tree: Any, factors: Any) -> Any:
        return jax.tree.map(operator.mul, tree, factors)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moved, first = optimizer.update(times(updates, gains(model, updates)), state[0], params)
        shrunk, second = decay.update(jax.tree.map(jnp.zeros_like, updates), state[1], params)
        moved = times(moved, rates(model, config.name, updates))
        return jax.tree.map(jnp.add, moved, shrunk), (first, second)

    return optax.GradientTransformation(lambda params: (optimizer.init(params), decay.init(params)), update)


class WeightAverage(NamedTuple):
    """Exponential moving average of the weights.

    Attributes:
        steps: [] int32, number of updates whose weights were averaged.
        total: sum of these weights, each times (1 - decay) decay^age.
    """

    steps: Array
    total: Any


def is_average(node: Any) -> bool:
    """Whether a node of an optimizer's state is the moving average of the weights."""
    return isinstance(node, WeightAverage)


def find_average(state: Any) -> WeightAverage:
    """The moving average of the weights in a state of :func:`make_optimizer` with ``ema_decay``."""
    (average,) = filter(is_average, jax.tree.leaves(state, is_leaf=is_average))
    return average


def averaged_weights(config: OptimizerConfig, state: Any) -> Any:
    """The average of the weights after each update so far, with factors that decay with age and sum to 1.

    Args:
        config: with ``ema_decay``.
        state: of :func:`make_optimizer`, after at least one update.
    """
    average = find_average(state)
    weight = -jnp.expm1(average.steps * math.log(np.float32(config.ema_decay)))
    weight = jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)  # 0 without an update
    return jax.tree.map(lambda total: total / weight, average.total)


def _averaging(decay: float) -> optax.GradientTransformation:
    """Average the weights that the updates lead to; the updates pass unchanged."""
    decay = float(np.float32(decay))  # so that the factors of old and new sum to 1

    def init(params: Any) -> Any:
        return WeightAverage(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        weights = optax.apply_updates(params, updates)
        total = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.total, weights)
        return updates, WeightAverage(state.steps + 1, total)

    return optax.GradientTransformation(init, update)


def _without_frozen(config: OptimizerConfig, optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer on parameters that are not frozen; the frozen have no optimizer state."""

    def labels(parameters: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if _is_frozen(config, path) else "trained", parameters
        )

    return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def gradient_norm(config: OptimizerConfig, gradients: Any) -> Array:
    """Global norm, [], of the gradients of all parameters that are not frozen."""
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return optax.global_norm([leaf for path, leaf in leaves if not _is_frozen(config, path)])


def adamw(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019)."""
    return optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def adafactor(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adafactor with the settings of T5 and Switch: second moments factored over dimensions from 128 on, no momentum,
    updates clipped at RMS 1 and multiplied by the parameter's RMS (Shazeer and Stern 2018, algorithm 4).

    These settings go with schedule "rsqrt", a learning rate of 1/√warmup_steps and no weight decay; if there is any, it
    is decoupled as in AdamW. Layers and experts that are stacked in one array share their clipping and scale.

    The two largest dimensions of an array are factored, so with E above D or F the experts' is one of them. That is
    Switch's own rule (Mesh TensorFlow, AdafactorOptimizer._factored_dims), and its models have E below D and F; T5X
    factors each expert's matrix instead (t5x/contrib/moe/adafactor_utils.py).
    """
    unscaled = optax.adafactor(decay_rate=0.8, clipping_threshold=1.0, min_dim_size_to_factor=128, eps=1e-30)
    return optax.chain(
        unscaled,
        optax.scale(-1.0),  # Optax's descends already
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def muon(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon on the matrices of attention, FFNs and experts, each layer and expert separately; AdamW on the rest.

    With ``muon_heads`` each head of attention is separate too ("Muon Split": GLM-5 2026, arXiv 2602.15763).
    Updates have an RMS of 0.2, so that AdamW's learning rate and weight decay serve both (Liu et al. 2025, section
    2.2). The roles are those of :mod:`moe.training.rates`.
    """

    def axes(parameters: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: matrix_axes(path, config.muon_heads), parameters)

    def labels(parameters: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "adamw" if matrix_axes(path) is None else "muon", parameters
        )

    matrices = optax.contrib.muon(
        schedule, weight_decay=config.weight_decay, muon_weight_dimension_numbers=axes, consistent_rms=0.2
    )
    return optax.multi_transform({"muon": matrices, "adamw": adamw(config, schedule)}, labels)


#: One entry per name that optimizer.name may have, beside module:function.
OPTIMIZERS: dict[str, Factory] = {"adamw": adamw, "adafactor": adafactor, "muon": muon}


def decay_mask(parameters: Any) -> Any:
    """True for what weight decay shrinks; the roles are those of :mod:`moe.training.rates`."""

    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), parameters)


#: Dtypes that a checkpoint can store with a checksum.
_STORED = tuple(
    map(jnp.dtype, ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "bfloat16", "float32"))
)


def _named(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    name, where = config.name, f"optimizer.name={config.name!r}"
    if ":" not in name:
        if name not in OPTIMIZERS:
            raise ConfigError(f"{where}: must be one of {', '.join(OPTIMIZERS)}, or module:function")
        return OPTIMIZERS[name](config, schedule)
    factory = import_object("optimizer.name", name)
    with raised_as_errors(f"{where}: calling it"):
        optimizer = factory(config, schedule)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ConfigError(f"{where}: must return an optax.GradientTransformation, not {type(optimizer).__name__}")

    def init(params: Any) -> Any:
        with raised_as_errors(f"{where}: its init"):
            state = jax.tree.map(jnp.asarray, optimizer.init(params))
        for leaf in jax.tree.leaves(state):
            if leaf.dtype not in _STORED:
                raise ConfigError(f"{where}: its state holds {leaf.dtype}, must be of {', '.join(map(str, _STORED))}")
        return state

    return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(optimizer).update)


def probe_own(
    config: OptimizerConfig,
    optimizer: optax.GradientTransformation,
    parameters: Any,
    state: Any,
    report: Any = None,
) -> None:
    """Refuse an optimizer of a user's module that cannot update a model; nothing is computed.

    Args:
        optimizer: of :func:`make_optimizer`.
        parameters: ShapeDtypeStructs of what is trained.
        state: ShapeDtypeStructs of its state.
        report: ShapeDtypeStructs of what its links read of the layers; None: nothing.

    Raises:
        ConfigError: update raises, or changes the structure, a shape or a type of the updates or of the state.
    """
    if ":" not in config.name:
        return
    where, update = f"optimizer.name={config.name!r}", optax.with_extra_args_support(optimizer).update
    with raised_as_errors(f"{where}: its update"):
        norm = jnp.ones(())
        found = jax.eval_shape(
            lambda tree, state, report: update(tree, state, tree, norm=norm, report=report), parameters, state, report
        )
    if not (isinstance(found, tuple) and len(found) == 2):
        raise ConfigError(f"{where}: its update must return (updates, state), not {type(found).__name__}")
    for name, before, after in (("updates", parameters, found[0]), ("state", state, found[1])):
        if jax.tree.structure(before) != jax.tree.structure(after):
            raise ConfigError(f"{where}: the {name} that its update returns have another structure")
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            kinds = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in (new, old)]
            if kinds[0] != kinds[1]:
                raise ConfigError(f"{where}: the {name} that its update returns are {kinds[0]}, not {kinds[1]}")


def _is_frozen(config: OptimizerConfig, path: Any) -> bool:
    return part_of([key.key for key in path]) in config.frozen


def _clip(largest: float) -> optax.GradientTransformationExtraArgs:
    """Clip by a global norm that is already known.

    optax.clip_by_global_norm computes the norm again and materialises the scaled gradients; a multiplication by one
    factor is fused into the optimizer's own pass over them.
    """

    def update(updates: Any, state: Any, params: Any = None, **known: Any) -> tuple[Any, Any]:
        factor = jnp.minimum(1.0, largest / known["norm"])
        return jax.tree.map(lambda gradient: gradient * factor, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _clipped_heads(optimizer: Any, config: OptimizerConfig, model: ModelConfig | None) -> Any:
    """The optimizer, then QK-clip where the model's heads are trained."""
    return optimizer if model is None else optax.chain(optimizer, qk_clip.qk_clip(model, config.qk_clip))


class Link(NamedTuple):
    """A link of the chain that a setting asks for.

    Attributes:
        setting: field of the section; empty: the link is always there.
        off: its value without the link.
        around: (optimizer, section, model or None) → optimizer with the link.
        signal: name of the layers' signal that it reads (``Call.signals``); empty: none.
        shape: of the signal.
        metrics: (section, report) → numbers to log by name.
    """

    setting: str
    off: Any
    around: Callable[[Any, OptimizerConfig, ModelConfig | None], Any]
    signal: str = ""
    shape: Callable[[ModelConfig], jax.ShapeDtypeStruct] | None = None
    metrics: Callable[[OptimizerConfig, Report], dict[str, Array]] | None = None

    def is_in(self, config: OptimizerConfig) -> bool:
        """Whether the setting asks for it."""
        return not self.setting or getattr(config, self.setting) != self.off


#: Links of :func:`make_optimizer`, from the innermost.
LINKS = (
    Link("moment_dtype", "float32", lambda optimizer, config, _: _stored_in(jnp.dtype(config.moment_dtype), optimizer)),
    Link("gradient_clip", 0.0, lambda optimizer, config, _: optax.chain(_clip(config.gradient_clip), optimizer)),
    Link("frozen", (), lambda optimizer, config, _: _without_frozen(config, optimizer)),
    Link("qk_clip", 0.0, _clipped_heads, qk_clip.SIGNAL, qk_clip.shape_of_scores, qk_clip.score_metrics),
    Link("ema_decay", 0.0, lambda optimizer, config, _: optax.chain(optimizer, _averaging(config.ema_decay))),
)

#: Links of :func:`in_steps`, from the innermost. A schedule's step is set on the device: had it been fetched with the
#: state, XLA would compute the learning rate in every loop that writes an update, and round it otherwise.
STEP_LINKS = (
    Link("", None, lambda optimizer, _, __: skip_not_finite(optimizer)),
    Link("skip_sigmas", 0.0, lambda optimizer, config, _: spikes.skip_spikes(optimizer, config.skip_sigmas)),
    Link("", None, lambda optimizer, _, __: follow_steps(optimizer)),
    Link("memory", "device", lambda optimizer, _, __: host_memory.fetched(optimizer)),
)
