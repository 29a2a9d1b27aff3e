"""Every setting of a run: one typed, immutable tree, and the one place that refuses nonsense.

In: an ``ml_collections.ConfigDict`` made by a file in ``configs/`` (and ``--config.x.y=value`` overrides).
Out: a frozen :class:`Config` whose values are known to be possible, or a :class:`ConfigError` that names the
field, its value and what is allowed.

Fields of :data:`GATES_OWN` (-1) or "gate" mean "what the gate's paper says"; :func:`resolve` fills them from
``moe.routing.GATES``, so that the rest of the code never sees -1 there.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import typing

import ml_collections

GATES_OWN = -1
LARGEST, LARGEST_FLOAT = 2**31 - 1, 3.4e38  # the devices' numbers have 32 bits
SCHEMES = ("gs", "s3", "az", "hf")  # of buckets that etils.epath reads


class ConfigError(ValueError):
    """A setting that cannot be honoured; the message names the field and what is allowed."""


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The MoE layer: which gate, how many experts, how tokens travel."""

    gate: str = "mixtral"  # a name in moe.routing.GATES, or "none": every FFN is dense
    num_experts: int = 8  # E
    experts_per_token: int = GATES_OWN  # K; -1: the gate's
    d_ff: int = 0  # F, hidden dim of one expert; 0: model.d_ff
    shared_d_ff: int = 0  # hidden dim of the expert that every token visits beside its K; n of F are one of n*F
    shared_gate: bool = False  # multiply the shared expert's output by sigmoid(x w) (Qwen2-MoE)
    every: int = 1  # layers between MoE layers: the n-th, 2n-th, ... layer is MoE
    layers: tuple[int, ...] = ()  # exactly these layers, from 0, are MoE; empty: what `every` and `first_dense` say
    first_dense: int = 0  # leading layers that stay dense whatever `every` says
    group_size: int = 0  # S, tokens that share one capacity; 0: one row of the batch. Never set by the mesh
    dispatch: str = "gather"  # a name in moe.dispatch.MODES
    capacity_factor: float = GATES_OWN  # C = ceil(capacity_factor * K * S / E); -1: the gate's
    eval_capacity_factor: float = GATES_OWN  # the same, outside training; -1: the gate's
    jitter: float = GATES_OWN  # multiplies the router's input by uniform [1 - jitter, 1 + jitter]; -1: the gate's
    load_balancing_weight: float = GATES_OWN  # of the load-balancing loss; -1: the gate's
    router_dtype: str = "float32"  # of the router's matmul: float32, or bfloat16 (Switch, table 2, what diverges)
    z_loss_weight: float = GATES_OWN  # of the router z-loss; -1: the gate's
    importance_weight: float = GATES_OWN  # of Shazeer's importance loss; -1: the gate's
    load_weight: float = GATES_OWN  # of Shazeer's load loss, gate noisy_topk; -1: the gate's
    device_balance_weight: float = GATES_OWN  # of the balance loss over expert_groups; -1: the gate's
    balance_scope: str = "gate"  # tokens one load-balancing loss sees: batch, group or sequence; "gate": the gate's
    bias_update_rate: float = GATES_OWN  # u of loss-free balancing, per step, gate deepseek_v3; -1: the gate's
    expert_groups: int = GATES_OWN  # groups the experts are split in; divides num_experts; -1: the gate's
    kept_expert_groups: int = GATES_OWN  # groups one token chooses from, DeepSeek's gates; -1: the gate's
    renormalise: int = GATES_OWN  # chosen weights divided by their sum: 1 yes, 0 no; -1: the gate's
    routing_scale: float = GATES_OWN  # factor of the chosen weights, DeepSeek's gates; -1: the gate's
    slots_per_expert: int = 1  # of gate soft_moe
    drop_policy: str = "gate"  # who is served first: position, probability or random; "gate": the gate's
    overflow_to_next: bool = False  # a pair that finds no room tries the token's next best expert, once
    expert_dropout: float = 0.0  # of the experts' hidden activations, in training (Switch: 0.4 when fine-tuning)
    accept_future_leak: bool = False  # allow gates whose choice for a token looks at later tokens


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder-only Transformer."""

    vocab_size: int = 4096  # V, rows of the embedding
    d_model: int = 256  # D
    num_layers: int = 4  # L
    num_heads: int = 8  # N, query heads
    num_kv_heads: int = 4  # M, key/value heads; divides num_heads
    head_dim: int = 32  # H, even
    d_ff: int = 512  # F, hidden dim of a dense FFN
    activation: str = "swiglu"  # swiglu, geglu, gelu or relu
    norm_eps: float = 1e-5  # epsilon of RMSNorm
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    sliding_window: int = 0  # tokens a query sees, itself included; 0: all
    sliding_window_layers: tuple[int, ...] = ()  # the layers, from 0, that have the window; empty: every layer
    qk_norm: str = "none"  # none, head (RMSNorm over H, Qwen3) or full (over N*H, OLMoE)
    attention: str = "full"  # full: all scores at once; blocked: never T x T, for long sequences and for TPUs
    attention_bias: str = "none"  # none, qkv (of queries, keys and values, Qwen2) or all (of the output too)
    clip_qkv: float = 0.0  # queries, keys and values are clipped to [-c, c] before they are rotated (OLMoE); 0: not
    tie_embeddings: bool = False  # logits = x E^T
    init_scale: float = (
        1.0  # s of every matrix: truncated normal, sigma = sqrt(s / fan_in) (0.1 in Switch, section 2.4)
    )
    dtype: str = "float32"  # of activations and matmuls; parameters and router are float32
    scan_layers: bool = True  # one compiled block for all equal layers
    remat: str = "none"  # a name in moe.transformer.REMAT_POLICIES
    moe: MoEConfig = MoEConfig()


#: What of the embedded corpus is used where data.domains says nothing.
EMBEDDED_DOMAINS = ("literature", "python")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text in, packed rows out."""

    dataset: str = "embedded"  # "embedded", a folder (/..., ./..., gs://...), a prepared TFDS dataset; or several, a,b
    domains: tuple[str, ...] = ()  # those to use, see docs/data.md; empty: all, of the embedded EMBEDDED_DOMAINS
    weights: tuple[float, ...] = ()  # share of rows per domain; empty: equal
    directory: str = "~/.cache/moe-data"  # where datasets, downloads and tokenizers are kept
    tokenizer: str = ""  # a tokenizer.model or tokenizer.json, or "mixtral"; empty: model.vocab_size are trained
    sequence_length: int = 256  # T, tokens
    streams: int = 0  # parts of a batch with documents of their own; a multiple of processes; 0: gcd(8, batch_size)
    shuffle_window: int = 512  # rows in the shuffle buffers of all streams
    heldout_rows: int = 64  # rows of T tokens per domain in each evaluation


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one of them may be -1: all that are left."""

    data: int = -1  # rows only
    fsdp: int = 1  # rows, and parameters split over D
    expert: int = 1  # rows, and experts split over E
    tensor: int = 1  # heads and F split


#: Parts of a model that optimizer.frozen and start.fresh may name.
FREEZABLE = ("embedding", "unembedding", "attention", "dense", "router", "experts", "shared")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 3e-3  # peak
    final_learning_rate_fraction: float = 0.1  # of the peak, at the last step
    warmup_steps: int = 30  # steps
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    gradient_clip: float = 1.0  # global norm; 0: no clipping
    frozen: tuple[str, ...] = ()  # parts that stay as they start: of FREEZABLE


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    num_steps: int = 320  # optimizer steps
    batch_size: int = 8  # B, rows of T tokens per optimizer step, all devices together
    accumulation_steps: int = 1  # microbatches per optimizer step; divides batch_size
    log_every: int = 10  # steps between rows of metrics
    eval_every: int = 80  # steps between evaluations on held-out text; the last step always evaluates
    save_every: int = 80  # steps between checkpoints; the last step always saves
    keep_checkpoints: int = 2  # newest ones kept, beside the best
    keep_every: int = 0  # steps; checkpoints of its multiples are kept for good; 0: of none
    max_skipped_steps: int = 8  # updates skipped in a row (loss or gradients not finite) that are borne
    on_skipped_steps: str = "rollback"  # what more of them lead to: rollback (to the last good checkpoint), or stop
    spike_sigmas: float = 6.0  # a loss so many deviations above the running median is warned of; 0: none is
    sample_tokens: int = 64  # length of the continuation sampled at the end; 0: none


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """What the parameters start as (moe.start)."""

    checkpoint: str = ""  # workdir of a run or an import; empty: random parameters
    expert_noise: float = 0.0  # upcycling: normal noise on each copied expert, in standard deviations of its weights
    fresh: tuple[str, ...] = ()  # parts that are not taken from the checkpoint but start at random: of FREEZABLE
    optimizer: str = "reset"  # the optimizer's state: reset, or carry (over from the checkpoint)


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """A teacher's probabilities as targets beside the text (Switch 2021, section 4.2)."""

    teacher: str = ""  # workdir of a run or an import; empty: none
    soft_share: float = 0.25  # of the loss, on the teacher's probabilities; the rest is on the text


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = 0  # of initialisation, data order and routing noise
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    start: StartConfig = StartConfig()
    distill: DistillConfig = DistillConfig()


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """A mutable, type-checked ConfigDict with the same fields, for files in ``configs/`` and command-line overrides."""

    def convert(node: typing.Any) -> ml_collections.ConfigDict:
        result = ml_collections.ConfigDict()
        hints = typing.get_type_hints(type(node))
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                value = convert(value)
            elif hints[field.name] is float:
                value = float(value)
            result[field.name] = value
        return result.lock()

    return convert(config)


def from_config_dict(tree: ml_collections.ConfigDict | dict[str, typing.Any]) -> Config:
    """The typed config of a tree, resolved and checked for everything that needs no devices and no data.

    Raises:
        ConfigError: an unknown field (with the nearest name), a wrong type, an impossible value or combination.
    """
    if not isinstance(tree, (dict, ml_collections.ConfigDict)):
        raise ConfigError(f"a config is an object with the sections of moe.config.Config, not {type(tree).__name__}")
    return validate(resolve(_build(Config, dict(tree.items()), "")))


def to_dict(config: Config) -> dict[str, typing.Any]:
    """Plain nested dict, ready for JSON."""
    return dataclasses.asdict(config)


def check_field(path: str) -> None:
    """Refuses a dotted name such as ``model.moe.num_experts`` that is no field of :class:`Config`.

    Raises:
        ConfigError: with the nearest name.
    """
    cls: typing.Any = Config
    *sections, last = path.split(".")
    for depth, name in enumerate(sections):
        _check_name(cls, name, "".join(f"{section}." for section in sections[:depth]))
        cls = typing.get_type_hints(cls)[name]
        if not dataclasses.is_dataclass(cls):
            raise ConfigError(f"{path}: {'.'.join(sections[: depth + 1])} is a single value, not a section")
    _check_name(cls, last, "".join(f"{section}." for section in sections))


def type_name(path: str) -> str:
    """What the values of a field are, for a message; a section has fields of its own."""
    hint: typing.Any = Config
    for name in path.split("."):
        hint = typing.get_type_hints(hint)[name]
    if dataclasses.is_dataclass(hint):
        return f"set by its fields: {', '.join(field.name for field in dataclasses.fields(hint))}"
    if typing.get_origin(hint) is tuple:
        return f"a tuple of {typing.get_args(hint)[0].__name__}, as in ('a','b') or (1,2)"
    return hint.__name__


def _check_name(cls: typing.Any, name: str, path: str) -> None:
    hints = typing.get_type_hints(cls)
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1)
        hint = f"did you mean {path}{near[0]}?" if near else f"fields here: {', '.join(hints)}"
        raise ConfigError(f"{path}{name}: no such field; {hint}")


def _build(cls: type, tree: dict[str, typing.Any], path: str) -> typing.Any:
    hints = typing.get_type_hints(cls)
    for name in tree:
        _check_name(cls, name, path)
    values = {}
    for name, value in tree.items():
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, (dict, ml_collections.ConfigDict)):
                raise ConfigError(f"{path}{name}={value!r}: is a section with fields of its own")
            values[name] = _build(typing.cast(type, hints[name]), dict(value.items()), f"{path}{name}.")
        else:
            values[name] = _check_type(hints[name], value, f"{path}{name}")
    return cls(**values)


def _check_type(hint: typing.Any, value: typing.Any, field: str) -> typing.Any:
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, (list, tuple)):
            return tuple(_check_type(item, entry, field) for entry in value)
        raise ConfigError(f"{field}={value!r}: must be a tuple of {item.__name__}")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and number:
        if not abs(value) <= LARGEST_FLOAT:
            raise ConfigError(f"{field}={value!r}: must be a finite number, in float32")
        return float(value)
    if not isinstance(value, hint) or (hint is int and not number):
        raise ConfigError(f"{field}={value!r}: must be {hint.__name__}, not {type(value).__name__}")
    if hint is int and abs(value) > LARGEST:
        raise ConfigError(f"{field}={value!r}: must be at most {LARGEST}")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{field}={value!r}: must not hold the character NUL")
    return value


def resolve(config: Config) -> Config:
    """Fills what was left to the gate and to other fields: every -1 of ``model.moe``, ``moe.d_ff`` of 0, and the
    domains of the embedded corpus.

    Raises:
        ConfigError: an unknown gate.
    """
    from moe.routing import GATES

    moe = config.model.moe
    known = ("none", *GATES)
    if moe.gate not in known:
        raise ConfigError(f"model.moe.gate={moe.gate!r}: must be one of {', '.join(known)}")
    # A dense model has no gate; any gate's constants do, since nothing reads them.
    gate = GATES["mixtral" if moe.gate == "none" else moe.gate]
    filled: dict[str, typing.Any] = {
        field.name: getattr(gate, field.name)
        for field in dataclasses.fields(moe)
        if hasattr(gate, field.name) and getattr(moe, field.name) in (GATES_OWN, "gate")
    }
    if filled.get("experts_per_token") == 0:
        filled["experts_per_token"] = moe.num_experts
    if filled.get("kept_expert_groups") == 0:
        filled["kept_expert_groups"] = filled.get("expert_groups", moe.expert_groups)
    if moe.d_ff == 0:
        filled["d_ff"] = config.model.d_ff
    moe = dataclasses.replace(moe, **filled)
    data = config.data
    if data.dataset == "embedded" and not data.domains:
        data = dataclasses.replace(data, domains=EMBEDDED_DOMAINS)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe), data=data)


def _require(holds: bool, field: str, value: typing.Any, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{field}={value!r}: {allowed}")


def check_path(field: str, path: str) -> None:
    """Refuses a path of a kind that etils.epath does not read. Raises ConfigError."""
    scheme, found, _ = path.partition("://")
    _require(
        not found or scheme in SCHEMES,
        field,
        path,
        f"must be a path, or one of {', '.join(SCHEMES)} before ://",
    )


def _require_choice(field: str, value: str, choices: typing.Iterable[str]) -> None:
    _require(value in choices, field, value, f"must be one of {', '.join(choices)}")


def _require_at_least(section: str, node: typing.Any, least: float, *names: str) -> None:
    for name in names:
        value = getattr(node, name)
        _require(value >= least, f"{section}{name}", value, f"must be at least {least}")


def _require_layers(field: str, layers: tuple[int, ...], num_layers: int) -> None:
    increasing = all(low < high for low, high in itertools.pairwise(layers))
    inside = all(0 <= layer < num_layers for layer in layers)
    _require(increasing and inside, field, layers, f"must be increasing layer numbers from 0 to {num_layers - 1}")


def validate(config: Config) -> Config:
    """Checks a resolved config; see :func:`from_config_dict`."""
    _validate_model(config.model)
    if config.model.moe.gate != "none":
        _validate_moe(config)
    _validate_run(config)
    return config


def _validate_model(model: ModelConfig) -> None:
    from moe.attention import ATTENTIONS
    from moe.layers import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS
    from moe.transformer import REMAT_POLICIES

    _require_at_least("model.", model, 1, "vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff")
    _require(model.num_layers <= 10_000, "model.num_layers", model.num_layers, "must be at most 10000")
    _require_at_least("model.", model, 0, "sliding_window", "clip_qkv")
    _require(
        model.head_dim >= 2 and model.head_dim % 2 == 0,
        "model.head_dim",
        model.head_dim,
        "must be even: rotary positions turn pairs",
    )
    _require(
        model.num_heads % model.num_kv_heads == 0,
        "model.num_kv_heads",
        model.num_kv_heads,
        f"must divide model.num_heads={model.num_heads}",
    )
    _require_choice("model.activation", model.activation, (*GATED_ACTIVATIONS, *PLAIN_ACTIVATIONS))
    _require_choice("model.qk_norm", model.qk_norm, ("none", "head", "full"))
    _require_choice("model.attention", model.attention, ATTENTIONS)
    _require_choice("model.attention_bias", model.attention_bias, ("none", "qkv", "all"))
    _require_layers("model.sliding_window_layers", model.sliding_window_layers, model.num_layers)
    _require(
        model.sliding_window > 0 or not model.sliding_window_layers,
        "model.sliding_window_layers",
        model.sliding_window_layers,
        "needs model.sliding_window above 0",
    )
    _require_choice("model.dtype", model.dtype, ("float32", "bfloat16"))
    _require_choice("model.remat", model.remat, tuple(REMAT_POLICIES))
    for name in ("norm_eps", "rope_theta", "init_scale"):
        _require(getattr(model, name) > 0, f"model.{name}", getattr(model, name), "must be positive")


def _validate_moe(config: Config) -> None:
    from moe.dispatch import MODES
    from moe.routing import GATES
    from moe.transformer import sparse_layers

    moe, where = config.model.moe, "model.moe."
    gate = GATES[moe.gate]
    _require_at_least(where, moe, 1, "num_experts", "experts_per_token", "d_ff", "every")
    _require_at_least(where, moe, 0, "shared_d_ff", "first_dense", "group_size")
    _require_at_least(where, moe, 0, "load_balancing_weight", "z_loss_weight")
    _require(
        moe.shared_d_ff > 0 or not moe.shared_gate, f"{where}shared_gate", moe.shared_gate, "needs shared_d_ff above 0"
    )
    k = moe.experts_per_token
    _require(k <= moe.num_experts, f"{where}experts_per_token", k, f"must be at most num_experts={moe.num_experts}")
    if gate.fixed_k:
        fixed = gate.experts_per_token or moe.num_experts
        _require(k == fixed, f"{where}experts_per_token", k, f"the gate {moe.gate!r} exists for {fixed} only")
    for name in ("capacity_factor", "eval_capacity_factor"):
        _require(getattr(moe, name) > 0, f"{where}{name}", getattr(moe, name), "must be positive")
    _require(0 <= moe.jitter < 1, f"{where}jitter", moe.jitter, "must be in [0, 1)")
    _require_choice(f"{where}dispatch", moe.dispatch, tuple(MODES))
    _require_choice(f"{where}router_dtype", moe.router_dtype, ("float32", "bfloat16"))
    _validate_gate(moe, where)
    _require_layers(f"{where}layers", moe.layers, config.model.num_layers)
    _require(
        not moe.layers or (moe.every == 1 and moe.first_dense == 0),
        f"{where}layers",
        moe.layers,
        f"says which layers are MoE: leave {where}every at 1 and {where}first_dense at 0",
    )
    _require(
        any(sparse_layers(config.model)),
        f"{where}every={moe.every}, {where}first_dense",
        moe.first_dense,
        f"leave no MoE layer among {config.model.num_layers}; use {where}gate=none for a dense model",
    )
    batch = config.train.batch_size // max(config.train.accumulation_steps, 1)
    tokens, length = batch * config.data.sequence_length, config.data.sequence_length
    size = moe.group_size or length
    _require(
        tokens % size == 0 and (size % length == 0 or length % size == 0),
        f"{where}group_size",
        moe.group_size,
        f"must divide or be a multiple of data.sequence_length={length}, and divide a microbatch's {tokens} tokens",
    )


def _validate_gate(moe: MoEConfig, where: str) -> None:
    """What the gate asks for must be possible, and what is set must be read by it."""
    from moe.balancing import BALANCE_SCOPES
    from moe.dispatch import DROP_POLICIES
    from moe.routing import GATES

    gate = GATES[moe.gate]
    _require_choice(f"{where}balance_scope", moe.balance_scope, BALANCE_SCOPES)
    _require_choice(f"{where}drop_policy", moe.drop_policy, DROP_POLICIES)
    _require_at_least(where, moe, 0, "importance_weight", "load_weight", "device_balance_weight", "bias_update_rate")
    _require_at_least(where, moe, 1, "slots_per_expert")
    _require(0 <= moe.expert_dropout < 1, f"{where}expert_dropout", moe.expert_dropout, "must be in [0, 1)")
    _require(
        moe.accept_future_leak or not gate.looks_ahead,
        f"{where}gate",
        moe.gate,
        "chooses for a token by looking at later ones, which this causal model must not see; "
        f"set {where}accept_future_leak=True to accept that",
    )
    groups, kept, k = moe.expert_groups, moe.kept_expert_groups, moe.experts_per_token
    _require(
        groups >= 1 and moe.num_experts % groups == 0,
        f"{where}expert_groups",
        groups,
        f"must be at least 1 and divide num_experts={moe.num_experts}",
    )
    _require(1 <= kept <= groups, f"{where}kept_expert_groups", kept, f"must be from 1 to expert_groups={groups}")
    # A field that another gate reads would be ignored here, silently.
    limited = gate.router == "biased" or gate.renormalise >= 0
    _require(
        limited or kept == groups,
        f"{where}kept_expert_groups",
        kept,
        f"the gate {moe.gate!r} chooses from all groups: leave it at -1",
    )
    _require(
        not limited or k <= kept * moe.num_experts // groups,
        f"{where}experts_per_token",
        k,
        f"must be at most the {kept * moe.num_experts // groups} experts of kept_expert_groups={kept} "
        f"of expert_groups={groups}",
    )
    _require(limited or moe.routing_scale == 1, f"{where}routing_scale", moe.routing_scale, "needs a DeepSeek gate")
    if gate.renormalise >= 0:
        _require(moe.renormalise in (0, 1), f"{where}renormalise", moe.renormalise, "must be 0, 1 or -1 (the gate's)")
    else:
        _require(moe.renormalise == -1, f"{where}renormalise", moe.renormalise, f"is fixed by the gate {moe.gate!r}")
    _require(
        moe.load_weight == 0 or gate.router == "noisy",
        f"{where}load_weight",
        moe.load_weight,
        "needs the gate noisy_topk: the load has no gradient without its noise",
    )
    _require(
        moe.bias_update_rate == 0 or gate.router == "biased",
        f"{where}bias_update_rate",
        moe.bias_update_rate,
        "needs the gate deepseek_v3",
    )
    _require(
        moe.slots_per_expert == 1 or gate.router == "slots",
        f"{where}slots_per_expert",
        moe.slots_per_expert,
        "needs the gate soft_moe",
    )
    _require(
        gate.router != "slots" or moe.dispatch == "einsum",
        f"{where}dispatch",
        moe.dispatch,
        "must be einsum: soft_moe mixes all tokens into every slot, so that there are no rows to move",
    )
    _require(
        not moe.overflow_to_next or (2 * k <= moe.num_experts and not gate.looks_ahead and moe.dispatch != "dropless"),
        f"{where}overflow_to_next",
        moe.overflow_to_next,
        "needs as many further experts as choices (num_experts >= 2 * experts_per_token), a capacity (a dispatch other "
        "than dropless), and a gate in which tokens choose",
    )


def _validate_run(config: Config) -> None:
    data, train, optimizer = config.data, config.train, config.optimizer
    _require(config.seed >= 0, "seed", config.seed, "must be at least 0")
    _require(0 <= config.seed < 2**31, "seed", config.seed, "must be in [0, 2^31)")
    _require_at_least("data.", data, 2, "sequence_length")
    _require_at_least("data.", data, 1, "shuffle_window", "heldout_rows")
    _require(
        data.streams >= 0 and (data.streams == 0 or train.batch_size % data.streams == 0),
        "data.streams",
        data.streams,
        f"must divide train.batch_size={train.batch_size}, or be 0 for gcd(8, batch_size)",
    )
    _require(all(data.dataset.split(",")), "data.dataset", data.dataset, "must name a dataset, or several, a,b")
    _require(data.directory != "", "data.directory", data.directory, "must name a folder; '.' is the current one")
    for name in data.dataset.split(","):
        check_path("data.dataset", name)
    check_path("data.directory", data.directory)
    check_path("data.tokenizer", data.tokenizer)
    check_path("start.checkpoint", config.start.checkpoint)
    check_path("distill.teacher", config.distill.teacher)
    _require(
        len(set(data.domains)) == len(data.domains) and all(data.domains),
        "data.domains",
        data.domains,
        "must name each domain once",
    )
    _require(
        len(data.weights) in (0, len(data.domains) or len(data.weights)) and all(weight > 0 for weight in data.weights),
        "data.weights",
        data.weights,
        f"must be empty or one positive share for each of the {len(data.domains)} domains",
    )
    _require_at_least("train.", train, 1, "num_steps", "batch_size", "accumulation_steps", "log_every", "eval_every")
    _require_at_least("train.", train, 1, "save_every", "keep_checkpoints")
    _require_at_least("train.", train, 1, "max_skipped_steps")
    _require_at_least("train.", train, 0, "sample_tokens", "keep_every", "spike_sigmas")
    _require_choice("train.on_skipped_steps", train.on_skipped_steps, ("rollback", "stop"))
    _require(
        train.keep_every % train.save_every == 0,
        "train.keep_every",
        train.keep_every,
        f"must be 0 or a multiple of train.save_every={train.save_every}",
    )
    _require(
        train.batch_size % train.accumulation_steps == 0,
        "train.accumulation_steps",
        train.accumulation_steps,
        f"must divide train.batch_size={train.batch_size}",
    )
    _require_at_least("optimizer.", optimizer, 0, "warmup_steps", "weight_decay", "gradient_clip")
    _require(optimizer.learning_rate > 0, "optimizer.learning_rate", optimizer.learning_rate, "must be positive")
    _require(optimizer.eps > 0, "optimizer.eps", optimizer.eps, "must be positive")
    for name in ("b1", "b2"):
        _require(0 <= getattr(optimizer, name) < 1, f"optimizer.{name}", getattr(optimizer, name), "must be in [0, 1)")
    for part in optimizer.frozen:
        _require_choice("optimizer.frozen", part, FREEZABLE)
    for part in config.start.fresh:
        _require_choice("start.fresh", part, FREEZABLE)
    _require_choice("start.optimizer", config.start.optimizer, ("reset", "carry"))
    _require(config.start.expert_noise >= 0, "start.expert_noise", config.start.expert_noise, "must be at least 0")
    soft = config.distill.soft_share
    _require(0 <= soft <= 1, "distill.soft_share", soft, "must be in [0, 1]")
    fraction = optimizer.final_learning_rate_fraction
    _require(0 <= fraction <= 1, "optimizer.final_learning_rate_fraction", fraction, "must be in [0, 1]")
    _require(
        optimizer.warmup_steps < train.num_steps,
        "optimizer.warmup_steps",
        optimizer.warmup_steps,
        f"must be below train.num_steps={train.num_steps}",
    )
    for axis in dataclasses.fields(MeshConfig):
        size = getattr(config.mesh, axis.name)
        _require(size == -1 or size >= 1, f"mesh.{axis.name}", size, "must be positive, or -1 to fill")
    filled = [axis.name for axis in dataclasses.fields(MeshConfig) if getattr(config.mesh, axis.name) == -1]
    _require(len(filled) <= 1, "mesh", filled, "only one axis can be -1")


def validate_mesh(config: Config, sizes: typing.Mapping[str, int]) -> None:
    """Checks a validated config against a mesh.

    Args:
        config: resolved.
        sizes: devices per axis, all filled in (``mesh.shape``).

    Raises:
        ConfigError: something that would be split does not divide.
    """
    model, moe, train = config.model, config.model.moe, config.train

    def divides(axes: tuple[str, ...], field: str, value: int) -> None:
        shards = 1
        for axis in axes:
            shards *= sizes[axis]
        names = " x ".join(f"mesh.{axis}" for axis in axes)
        _require(value % shards == 0, field, value, f"must be divisible by {names} = {shards}")

    tokens = ("data", "fsdp", "expert")
    rows = train.batch_size // train.accumulation_steps
    divides(tokens, "train.batch_size / train.accumulation_steps", rows)
    divides(("fsdp",), "model.d_model", model.d_model)
    divides(("tensor",), "model.num_heads", model.num_heads)
    divides(("tensor",), "model.num_kv_heads", model.num_kv_heads)
    divides(("tensor",), "model.d_ff", model.d_ff)
    divides(("tensor",), "model.vocab_size", model.vocab_size)
    if moe.gate == "none":
        return
    divides(("expert",), "model.moe.num_experts", moe.num_experts)
    divides(("tensor",), "model.moe.d_ff", moe.d_ff)
    divides(("tensor",), "model.moe.shared_d_ff", moe.shared_d_ff)
    groups = rows * config.data.sequence_length // (moe.group_size or config.data.sequence_length)
    divides(tokens, f"model.moe.group_size={moe.group_size} makes a number of groups which", groups)
