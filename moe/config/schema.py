"""Every setting of a run, with its unit and default, as frozen dataclasses."""

from __future__ import annotations

import dataclasses
from typing import Literal

GATES_OWN = -1


LARGEST, LARGEST_FLOAT = 2**31 - 1, 3.4e38  # the devices' numbers have 32 bits


SCHEMES = ("gs", "s3", "az", "hf")  # of buckets that etils.epath reads


Dispatch = Literal["gather", "einsum", "dropless"]
DropPolicy = Literal["position", "probability", "random"]
BalanceScope = Literal["batch", "group", "sequence"]
Activation = Literal["swiglu", "geglu", "geglu_exact", "reglu", "gelu", "relu"]
QKNorm = Literal["none", "head", "full"]
Attention = Literal["full", "blocked"]
AttentionBias = Literal["none", "qkv", "all"]
DType = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]
OnSkippedSteps = Literal["rollback", "stop"]
OptimizerState = Literal["reset", "carry"]


class ConfigError(ValueError):
    """A setting that cannot be honoured; the message names the field and what is allowed."""


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The MoE layer: which gate, how many experts, how tokens travel."""

    gate: str = "mixtral"  # a name in moe.routing.registry.GATES, or "none": every FFN is dense
    num_experts: int = 8  # E
    experts_per_token: int = GATES_OWN  # K; -1: the gate's
    d_ff: int = 0  # F, hidden dim of one expert; 0: model.d_ff
    shared_d_ff: int = 0  # hidden dim of the expert that every token visits beside its K; n of F are one of n*F
    shared_gate: bool = False  # multiply the shared expert's output by sigmoid(x w) (Qwen2-MoE)
    every: int = 1  # layers between MoE layers: the n-th, 2n-th, ... layer is MoE
    layers: tuple[int, ...] = ()  # exactly these layers, from 0, are MoE; empty: what `every` and `first_dense` say
    first_dense: int = 0  # leading layers that stay dense whatever `every` says
    group_size: int = 0  # S, tokens that share one capacity; 0: one row of the batch. Never set by the mesh
    dispatch: Dispatch = "gather"  # how assignments reach their experts
    capacity_factor: float = GATES_OWN  # C = ceil(capacity_factor * K * S / E); -1: the gate's
    eval_capacity_factor: float = GATES_OWN  # the same, outside training; -1: the gate's
    jitter: float = GATES_OWN  # multiplies the router's input by uniform [1 - jitter, 1 + jitter]; -1: the gate's
    load_balancing_weight: float = GATES_OWN  # of the load-balancing loss; -1: the gate's
    router_dtype: DType = "float32"  # of the router's matmul: float32, or bfloat16 (Switch, table 2, what diverges)
    z_loss_weight: float = GATES_OWN  # of the router z-loss; -1: the gate's
    importance_weight: float = GATES_OWN  # of Shazeer's importance loss; -1: the gate's
    load_weight: float = GATES_OWN  # of Shazeer's load loss, gate noisy_topk; -1: the gate's
    device_balance_weight: float = GATES_OWN  # of the balance loss over expert_groups; -1: the gate's
    balance_scope: Literal[BalanceScope, "gate"] = (
        "gate"  # tokens one load-balancing loss sees: batch, group or sequence; "gate": the gate's
    )
    bias_update_rate: float = GATES_OWN  # u of loss-free balancing, per step, gate deepseek_v3; -1: the gate's
    expert_groups: int = GATES_OWN  # groups the experts are split in; divides num_experts; -1: the gate's
    kept_expert_groups: int = GATES_OWN  # groups one token chooses from, DeepSeek's gates; -1: the gate's
    renormalise: int = GATES_OWN  # chosen weights divided by their sum: 1 yes, 0 no; -1: the gate's
    routing_scale: float = GATES_OWN  # factor of the chosen weights, DeepSeek's gates; -1: the gate's
    slots_per_expert: int = 1  # of gate soft_moe
    drop_policy: Literal[DropPolicy, "gate"] = (
        "gate"  # who is served first: position, probability or random; "gate": the gate's
    )
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
    activation: Activation = "swiglu"  # swiglu, geglu, gelu or relu
    norm_eps: float = 1e-5  # epsilon of RMSNorm
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    sliding_window: int = 0  # tokens a query sees, itself included; 0: all
    sliding_window_layers: tuple[int, ...] = ()  # the layers, from 0, that have the window; empty: every layer
    qk_norm: QKNorm = "none"  # none, head (RMSNorm over H, Qwen3) or full (over N*H, OLMoE)
    attention: Attention = "full"  # full: all scores at once; blocked: never T x T, for long sequences and for TPUs
    attention_bias: AttentionBias = "none"  # none, qkv (of queries, keys and values, Qwen2) or all (of the output too)
    clip_qkv: float = 0.0  # queries, keys and values are clipped to [-c, c] before they are rotated (OLMoE); 0: not
    tie_embeddings: bool = False  # logits = x E^T
    init_scale: float = (
        1.0  # s of every matrix: truncated normal, sigma = sqrt(s / fan_in) (0.1 in Switch, section 2.4)
    )
    dtype: DType = "float32"  # of activations and matmuls; parameters and router are float32
    scan_layers: bool = True  # one compiled block for all equal layers
    remat: Remat = "none"  # what the backward pass recomputes
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
Part = Literal["embedding", "unembedding", "attention", "dense", "router", "experts", "shared"]


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
    frozen: tuple[Part, ...] = ()  # parts that stay as they start


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
    on_skipped_steps: OnSkippedSteps = (
        "rollback"  # what more of them lead to: rollback (to the last good checkpoint), or stop
    )
    spike_sigmas: float = 6.0  # a loss so many deviations above the running median is warned of; 0: none is
    sample_tokens: int = 64  # length of the continuation sampled at the end; 0: none


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """What the parameters start as (moe.training.warm_start)."""

    checkpoint: str = ""  # workdir of a run or an import; empty: random parameters
    expert_noise: float = 0.0  # upcycling: normal noise on each copied expert, in standard deviations of its weights
    fresh: tuple[Part, ...] = ()  # parts that are not taken from the checkpoint but start at random
    optimizer: OptimizerState = "reset"  # the optimizer's state: reset, or carry (over from the checkpoint)


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
