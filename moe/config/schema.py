"""Every setting of a run, with its unit and default, as frozen dataclasses."""

from __future__ import annotations

import dataclasses
from typing import Literal

from moe.config.moe_section import DType, MoEConfig

#: Schemes of remote paths that etils.epath reads.
SCHEMES = ("gs", "s3", "az", "hf")


Activation = Literal["swiglu", "swiglu_clamped", "geglu", "geglu_exact", "reglu", "gelu", "relu"]
QKNorm = Literal["none", "head", "full", "rotated"]
Norms = Literal["before", "after"]
Attention = Literal["full", "blocked"]
RopeScaling = Literal["none", "linear", "dynamic", "yarn", "longrope", "llama3"]
AttentionBias = Literal["none", "qkv", "all"]
Remat = Literal["none", "hidden", "outputs", "attention", "dots", "full"]
OnSkippedSteps = Literal["rollback", "stop"]
OptimizerState = Literal["reset", "carry"]
Schedule = Literal["cosine", "constant", "wsd", "rsqrt"]
MomentDType = Literal["float32", "bfloat16"]
LowPrecision = Literal["none", "int8", "float8"]
Objective = Literal["causal", "prefix_lm", "span_corruption", "pairs", "chat", "preferences"]


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """Scaling of rotary positions for contexts longer than those of pre-training."""

    kind: RopeScaling = "none"
    factor: float = 1.0  # longest context over original_length
    original_length: int = 0  # tokens, context of pre-training; all but linear
    beta_fast: float = 32.0  # yarn: rotations in the original context above which a pair is not interpolated
    beta_slow: float = 1.0  # yarn: rotations below which it is interpolated fully
    truncate: bool = True  # yarn: round the two bounds to whole pairs
    attention_factor: float = 0.0  # yarn and longrope: factor of rotated queries and keys; 0: computed
    mscale: float = 0.0  # yarn: DeepSeek's constants of that factor; 0: not used
    mscale_all_dim: float = 0.0
    short_factors: tuple[float, ...] = ()  # longrope: divisor of each pair's frequency up to original_length
    long_factors: tuple[float, ...] = ()  # longrope: the same for longer rows
    low_freq_factor: float = 1.0  # llama3: rotations in the original context below which a pair is interpolated fully
    high_freq_factor: float = 4.0  # llama3: rotations above which a pair is not interpolated


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Transformer: decoder-only, or encoder and decoder."""

    vocab_size: int = 4096  # V, rows of the embedding
    d_model: int = 256  # D
    num_layers: int = 4  # L, of the decoder
    encoder_layers: int = 0  # L of the encoder, which the decoder attends to; 0: decoder-only
    encoder_vocab_size: int = 0  # V of an embedding of the encoder's own; 0: one for encoder and decoder
    num_heads: int = 8  # N, query heads
    num_kv_heads: int = 4  # M, key/value heads; divides num_heads
    head_dim: int = 32  # H, even for rotary positions
    d_ff: int = 512  # F, hidden dim of a dense FFN
    activation: Activation = "swiglu"
    norm_eps: float = 1e-5  # epsilon of RMSNorm
    norms: Norms = "before"  # attention and FFN: norm of what they read, or after them of what they give (OLMo 2)
    embedding_scale: float = 1.0  # factor of the embedded tokens (Granite: 12)
    residual_scale: float = 1.0  # factor of what attention and FFN add to the residual stream (Granite: 0.22)
    attention_scale: float = 0.0  # factor of query·key (Granite: 1/H); 0: 1/sqrt(H)
    logit_scale: float = 1.0  # factor of the logits (Granite: 1/6)
    relative_buckets: int = 0  # T5's attention: biases of so many buckets of distances, no 1/sqrt(H); 0: rotary
    relative_max_distance: int = 128  # tokens, distance from which the last bucket holds
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    rope_dim: int = 0  # rotated dimensions of a head, even; 0: all
    rope_interleaved: bool = False  # rotate pairs (2i, 2i+1) (DeepSeek) instead of (i, i + H/2)
    kv_lora_rank: int = 0  # dimension of the latent of keys and values (DeepSeek-V2); 0: grouped-query attention
    q_lora_rank: int = 0  # latent attention: dimension of the latent of queries; 0: none
    value_dim: int = 0  # latent attention: H of the values
    sliding_window: int = 0  # tokens a query attends to, including its own; 0: all
    sliding_window_layers: tuple[int, ...] = ()  # layers with the window, from 0; empty: all
    qk_norm: QKNorm = "none"  # RMSNorm of queries, keys: head (over H, Qwen3), full (N*H, OLMoE), rotated (H; Hunyuan)
    attention: Attention = "full"  # full: all scores at once; blocked: without a T x T array, for TPUs and long rows
    attention_bias: AttentionBias = "none"  # qkv (Qwen2); all: of the output too
    attention_sinks: bool = False  # a further key of learnt logit and no value per head (gpt-oss)
    clip_qkv: float = 0.0  # clip queries, keys and values to [-c, c] before the rotation (OLMoE); 0: no clipping
    tie_embeddings: bool = False  # logits = x E^T
    scale_logits: bool = False  # divide the logits by sqrt(D) (T5 1.0); the embedding's sigma is then sqrt(s)
    dropout: float = 0.0  # of embeddings, attention weights, hidden activations and the output of each half of a block
    init_scale: float = 1.0  # s; matrices are truncated normal, sigma = sqrt(s / fan_in) (Switch, section 2.4: 0.1)
    dtype: DType = "float32"  # of activations and matmuls; parameters and router are float32
    low_precision: LowPrecision = "none"  # of factors in experts and dense FFNs (moe.dispatch.quantized)
    scan_layers: bool = True  # compile one block for all equal layers
    remat: Remat = "none"  # what the backward pass recomputes: nothing, ..., the whole layer (REMAT_POLICIES)
    moe: MoEConfig = MoEConfig()

    @property
    def expert_dim(self) -> int:
        """Dimension of the rows that experts read and write."""
        return self.moe.latent_dim or self.d_model


#: Default of data.domains for the embedded corpus.
EMBEDDED_DOMAINS = ("literature", "python")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text datasets, tokenizer, objective, and packed rows."""

    dataset: str = (
        "embedded"  # "embedded", a folder (/..., ./..., gs://...) or a prepared TFDS dataset; or several, a,b
    )
    domains: tuple[str, ...] = ()  # domains to use (docs/data.md); empty: all, for the embedded corpus EMBEDDED_DOMAINS
    text_suffixes: tuple[str, ...] = ()  # of files of a folder that are text, as ".tex"; beside .txt, .md, .py, ...
    weights: tuple[float, ...] = ()  # share of rows per domain; empty: equal
    directory: str = "~/.cache/moe-data"  # for prepared datasets, downloads and tokenizers
    tokenizer: str = ""  # a tokenizer.model, a tokenizer.json or "mixtral"; empty: trained, of model.vocab_size
    chat_template: str = ""  # objective chat: a file with a Jinja template; empty: that of the tokenizer
    objective: Objective = "causal"  # what is predicted (moe.data.objectives); with an encoder span_corruption instead
    sequence_length: int = 256  # T, tokens
    input_length: int = 0  # U, tokens of an encoder's row; 0: sequence_length where there is an encoder
    pack: bool = True  # rows of an encoder-decoder hold several examples; False: one, and padding
    corruption_rate: float = 0.15  # span_corruption: share of the tokens that is removed
    mean_span: float = 3.0  # span_corruption: tokens removed at once, on average
    streams: int = 0  # independent document streams per batch, a multiple of processes; 0: gcd(8, batch_size)
    shuffle_window: int = 512  # rows in the shuffle buffers of all streams
    heldout_rows: int = 64  # rows of T tokens per domain in each evaluation

    @property
    def conversations(self) -> bool:
        """Whether documents are conversations, rendered by a chat template."""
        return self.objective in ("chat", "preferences")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one size may be -1: all remaining devices."""

    data: int = -1  # splits rows
    fsdp: int = 1  # splits rows, and parameters over D
    expert: int = 1  # splits rows, and experts over E
    tensor: int = 1  # splits heads and F
    context: int = 1  # splits the positions of a row


#: Parts of a model that optimizer.frozen and start.fresh can name. Each parameter belongs to one: relative biases and
#: norms inside attention to attention, norms before and after layers to norms, a shared expert's FFN to shared.
Part = Literal[
    "embedding", "unembedding", "attention", "dense", "router", "experts", "shared", "latent", "null", "norms"
]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, and the learning-rate schedule."""

    name: str = "adamw"  # adamw, adafactor, muon, or module:function (see moe.training.optimizer.Factory)

    learning_rate: float = 3e-3  # peak
    #: after a linear warm-up cosine decay, constant, or wsd (constant, then a decay); rsqrt: the peak, then 1/√step
    schedule: Schedule = "cosine"
    final_learning_rate_fraction: float = 0.1  # of the peak, at the last step; cosine and wsd
    warmup_steps: int = 30  # steps
    decay_steps: int = 0  # steps of the decay of wsd; 0: a tenth of train.num_steps
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices only
    gradient_clip: float = 1.0  # largest global norm; 0: no clipping
    moment_dtype: MomentDType = "float32"  # in which moments are stored; adamw and muon also in bfloat16
    frozen: tuple[Part, ...] = ()  # parts that are not trained
    ema_decay: float = 0.0  # per step, of an average of the weights that is evaluated beside them; 0: none


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Training loop."""

    num_steps: int = 320  # optimizer steps
    batch_size: int = 8  # B, rows of T tokens per optimizer step, over all devices
    accumulation_steps: int = 1  # microbatches per optimizer step; divides batch_size
    log_every: int = 10  # steps between rows of metrics
    eval_every: int = 80  # steps between evaluations on held-out text; the last step always evaluates
    save_every: int = 80  # steps between checkpoints; the last step always saves
    keep_checkpoints: int = 2  # newest checkpoints to keep, besides the best
    keep_every: int = 0  # steps; checkpoints at its multiples are never deleted; 0: none
    max_skipped_steps: int = 8  # consecutive skipped updates (loss or gradients not finite) tolerated
    on_skipped_steps: OnSkippedSteps = "rollback"  # after more of them: return to the last good checkpoint, or stop
    spike_sigmas: float = 6.0  # warn of a loss this many deviations above the running median; 0: never
    sample_tokens: int = 64  # length of the text sampled at the end; 0: none
    compilation_cache: str = "auto"  # folder for compiled programs (moe.compilation_cache); empty: none
    writers: tuple[str, ...] = ("tensorboard",)  # of metrics, besides JSON lines: tensorboard, wandb, module:function


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """Initial parameters (moe.training.warm_start).

    With a checkpoint, model fields that the config file or the command line does not set are the checkpoint's, and so
    is the tokenizer if data.tokenizer is empty.
    """

    checkpoint: str = ""  # workdir of a run or an import; empty: random parameters
    expert_noise: float = 0.0  # upcycling: normal noise on each copied expert, in standard deviations of its weights
    virtual_groups: bool = False  # upcycling: one router column for the experts that together hold the dense FFN
    expert_scale: float = 1.0  # upcycling: factor of the copied down matrices; the number of shards keeps the output
    drop_share: float = 0.0  # upcycling: share of each expert's hidden units drawn anew (drop-upcycling: 0.5)
    fresh: tuple[Part, ...] = ()  # parts initialised at random instead of taken from the checkpoint
    optimizer: OptimizerState = "reset"  # optimizer state: new, or carried over from the checkpoint


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Distillation: a teacher's probabilities as targets besides the text (Switch 2021, section 4.2)."""

    teacher: str = ""  # workdir of a run or an import; empty: none
    soft_share: float = 0.25  # share of the loss on the teacher's probabilities; the rest is on the text


@dataclasses.dataclass(frozen=True)
class PreferencesConfig:
    """Training on preferred answers (data.objective preferences); distill.teacher is the reference model."""

    beta: float = 0.1  # weight of the log-probabilities against the reference's (DPO)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters over a fixed checkpoint, start.checkpoint (moe.models.adapters)."""

    rank: int = 0  # columns of A; 0: no adapters, all parameters are trained
    alpha: float = 16.0  # A B is multiplied by alpha / rank
    parts: tuple[Part, ...] = ("attention", "dense", "experts", "shared", "latent")  # whose matrices have adapters
    trained: tuple[Part, ...] = ()  # parts that are trained whole beside the adapters, such as router
    common_a: bool = False  # all experts of a layer have one A, and a B each


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run."""

    seed: int = 0  # of initialisation, data order and routing noise
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    start: StartConfig = StartConfig()
    distill: DistillConfig = DistillConfig()
    lora: LoraConfig = LoraConfig()
    preferences: PreferencesConfig = PreferencesConfig()
