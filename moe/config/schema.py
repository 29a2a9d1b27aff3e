"""Every setting of a run as frozen dataclasses, with its unit, default, bounds, and whether a run may change it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from moe.config.moe_section import DType, MoEConfig
from moe.fields import setting

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

    kind: RopeScaling = "none"  # of the checkpoint's config; none: frequencies as they are
    factor: float = setting(1.0, least=1)  # longest context over original_length
    original_length: int = setting(0, least=0)  # tokens, context of pre-training; all but linear
    #: yarn: rotations in the original context above which a pair is not interpolated
    beta_fast: float = setting(32.0, above=0)
    beta_slow: float = setting(1.0, above=0)  # yarn: rotations below which it is interpolated fully
    truncate: bool = True  # yarn: round the two bounds to whole pairs
    #: yarn and longrope: factor of rotated queries and keys; 0: computed
    attention_factor: float = setting(0.0, least=0)
    mscale: float = setting(0.0, least=0)  # yarn: DeepSeek's constants of that factor; 0: not used
    mscale_all_dim: float = setting(0.0, least=0)  # the same; latent attention also scales its scores by it
    short_factors: tuple[float, ...] = ()  # longrope: divisor of each pair's frequency up to original_length
    long_factors: tuple[float, ...] = ()  # longrope: the same for longer rows
    #: llama3: rotations in the original context below which a pair is interpolated fully
    low_freq_factor: float = setting(1.0, above=0)
    high_freq_factor: float = 4.0  # llama3: rotations above which a pair is not interpolated


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Transformer: decoder-only, or encoder and decoder."""

    vocab_size: int = setting(4096, least=1, most=2**24)  # V, rows of the embedding
    d_model: int = setting(256, least=1, most=2**20)  # D
    num_layers: int = setting(4, least=1, most=10_000)  # L, of the decoder
    #: L of the encoder, which the decoder attends to; 0: decoder-only
    encoder_layers: int = setting(0, least=0, most=10_000)
    #: V of an embedding of the encoder's own; 0: one for encoder and decoder
    encoder_vocab_size: int = setting(0, least=0, most=2**24)
    num_heads: int = setting(8, least=1, most=2**16)  # N, query heads
    num_kv_heads: int = setting(4, least=1, most=2**16)  # M, key/value heads; divides num_heads
    head_dim: int = setting(32, most=2**16)  # H, even for rotary positions
    d_ff: int = setting(512, least=1, most=2**22)  # F, hidden dim of a dense FFN
    activation: Activation = "swiglu"  # of FFNs and experts; names with glu have a gate matrix
    norm_eps: float = setting(1e-5, above=0)  # epsilon of RMSNorm
    norms: Norms = "before"  # attention and FFN: norm of what they read, or after them of what they give (OLMo 2)
    embedding_scale: float = setting(1.0, above=0)  # factor of the embedded tokens (Granite: 12)
    #: factor of what attention and FFN add to the residual stream (Granite: 0.22)
    residual_scale: float = setting(1.0, above=0)
    attention_scale: float = setting(0.0, least=0)  # factor of query·key (Granite: 1/H); 0: 1/sqrt(H)
    logit_scale: float = setting(1.0, above=0)  # factor of the logits (Granite: 1/6)
    #: T5's attention: biases of so many buckets of distances, no 1/sqrt(H); 0: rotary
    relative_buckets: int = setting(0, least=0)
    relative_max_distance: int = 128  # tokens, distance from which the last bucket holds
    rope_theta: float = setting(10_000.0, above=0)  # base of the rotary frequencies
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    rope_dim: int = 0  # rotated dimensions of a head, even; 0: all
    rope_interleaved: bool = False  # rotate pairs (2i, 2i+1) (DeepSeek) instead of (i, i + H/2)
    #: dimension of the latent of keys and values (DeepSeek-V2); 0: grouped-query attention
    kv_lora_rank: int = setting(0, least=0, most=2**16)
    q_lora_rank: int = setting(0, least=0, most=2**16)  # latent attention: dimension of the latent of queries; 0: none
    value_dim: int = setting(0, least=0, most=2**16)  # latent attention: H of the values
    sliding_window: int = setting(0, least=0)  # tokens a query attends to, including its own; 0: all
    sliding_window_layers: tuple[int, ...] = ()  # layers with the window, from 0; empty: all
    qk_norm: QKNorm = "none"  # RMSNorm of queries, keys: head (over H, Qwen3), full (N*H, OLMoE), rotated (H; Hunyuan)
    attention: Attention = "full"  # full: all scores at once; blocked: without a T x T array, for TPUs and long rows
    attention_bias: AttentionBias = "none"  # qkv (Qwen2); all: of the output too
    attention_sinks: bool = False  # a further key of learnt logit and no value per head (gpt-oss)
    #: clip queries, keys and values to [-c, c] before the rotation (OLMoE); 0: no clipping
    clip_qkv: float = setting(0.0, least=0)
    tie_embeddings: bool = False  # logits = x E^T
    scale_logits: bool = False  # divide the logits by sqrt(D) (T5 1.0); the embedding's sigma is then sqrt(s)
    #: layers after the last, each predicting one token further (DeepSeek-V3: 1)
    prediction_layers: int = setting(0, least=0, most=64)
    prediction_weight: float = setting(0.3, least=0)  # of the mean of their losses (DeepSeek-V3: 0.3, later 0.1)
    #: of embeddings, attention weights, hidden activations and the output of each half of a block
    dropout: float = setting(0.0, share=True)
    #: s; matrices are truncated normal, sigma = sqrt(s / fan_in) (Switch, section 2.4: 0.1)
    init_scale: float = setting(1.0, above=0, most=1e4)
    dtype: DType = "float32"  # of activations and matmuls; parameters and router are float32
    low_precision: LowPrecision = "none"  # of factors in experts and dense FFNs (moe.dispatch.quantized)
    scan_layers: bool = setting(True, resume="free")  # compile one block for all equal layers
    #: what the backward pass recomputes: nothing, ..., the whole layer (REMAT_POLICIES)
    remat: Remat = setting("none", resume="free")
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

    #: "embedded", a folder (/..., ./..., gs://...) or a prepared TFDS dataset; or several, a,b
    dataset: str = "embedded"
    domains: tuple[str, ...] = ()  # domains to use; empty: all, of "embedded" literature and python
    text_suffixes: tuple[str, ...] = ()  # of files of a folder that are text, as ".tex"; beside .txt, .md, .py, ...
    weights: tuple[float, ...] = ()  # share of rows per domain; empty: equal
    directory: str = setting("~/.cache/moe-data", resume="free")  # for prepared datasets, downloads and tokenizers
    tokenizer: str = ""  # a tokenizer.model, a tokenizer.json or "mixtral"; empty: trained, of model.vocab_size
    chat_template: str = ""  # objective chat: a file with a Jinja template; empty: that of the tokenizer
    objective: Objective = "causal"  # what is predicted (moe.data.objectives); with an encoder span_corruption instead
    sequence_length: int = setting(256, least=2, most=2**24)  # T, tokens
    #: U, tokens of an encoder's row; 0: sequence_length where there is an encoder
    input_length: int = setting(0, least=0, most=2**24)
    pack: bool = True  # rows of an encoder-decoder hold several examples; False: one, and padding
    corruption_rate: float = setting(0.15, above=0, below=1)  # span_corruption: share of the tokens that is removed
    mean_span: float = setting(3.0, least=1)  # span_corruption: tokens removed at once, on average
    #: independent document streams per batch, a multiple of processes; 0: gcd(8, batch_size)
    streams: int = setting(0, least=0, most=2**16)
    shuffle_window: int = setting(512, least=1)  # rows in the shuffle buffers of all streams
    heldout_rows: int = setting(64, least=1)  # rows of T tokens per domain in each evaluation

    @property
    def conversations(self) -> bool:
        """Whether documents are conversations, rendered by a chat template."""
        return self.objective in ("chat", "preferences")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one size may be -1: all remaining devices."""

    data: int = setting(-1, resume="free")  # splits rows
    fsdp: int = setting(1, resume="free")  # splits rows, and parameters over D
    expert: int = setting(1, resume="free")  # splits rows, and experts over E
    tensor: int = setting(1, resume="free")  # splits heads and F
    context: int = setting(1, resume="free")  # splits the positions of a row


#: Parts of a model that optimizer.frozen and start.fresh can name. Each parameter belongs to one: relative biases and
#: norms inside attention to attention, norms before and after layers to norms, a shared expert's FFN to shared.
Part = Literal[
    "embedding", "unembedding", "attention", "dense", "router", "experts", "shared", "latent", "null", "norms"
]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, and the learning-rate schedule."""

    name: str = "adamw"  # adamw, adafactor, muon, or module:function (see moe.training.optimizer.Factory)

    learning_rate: float = setting(3e-3, above=0, most=1e3, resume="later")  # peak
    #: after a linear warm-up cosine decay, constant, or wsd (constant, then a decay); rsqrt: the peak, then 1/√step
    schedule: Schedule = setting("cosine", resume="later")
    #: of the peak, at the last step; cosine and wsd
    final_learning_rate_fraction: float = setting(0.1, least=0, most=1, resume="later")
    warmup_steps: int = setting(30, least=0, resume="later")  # steps
    decay_steps: int = setting(0, least=0, resume="later")  # steps of the decay of wsd; 0: a tenth of train.num_steps
    b1: float = setting(0.9, share=True, resume="later")  # adamw: decay of the first moment
    b2: float = setting(0.95, share=True, resume="later")  # adamw: decay of the second moment
    eps: float = setting(1e-8, above=0, resume="later")  # adamw: added to the root of the second moment
    weight_decay: float = setting(0.1, least=0, most=1e3, resume="later")  # of matrices only
    gradient_clip: float = setting(1.0, least=0)  # largest global norm; 0: no clipping
    moment_dtype: MomentDType = "float32"  # in which moments are stored; adamw and muon also in bfloat16
    frozen: tuple[Part, ...] = ()  # parts that are not trained
    #: per step, of an average of the weights that is evaluated beside them; 0: none
    ema_decay: float = setting(0.0, share=True)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Training loop."""

    num_steps: int = setting(320, least=1, resume="later")  # optimizer steps
    batch_size: int = setting(8, least=1, most=2**24)  # B, rows of T tokens per optimizer step, over all devices
    accumulation_steps: int = setting(1, least=1)  # microbatches per optimizer step; divides batch_size
    log_every: int = setting(10, least=1, resume="free")  # steps between rows of metrics
    #: steps between evaluations on held-out text; the last step always evaluates
    eval_every: int = setting(80, least=1, resume="free")
    save_every: int = setting(80, least=1, resume="free")  # steps between checkpoints; the last step always saves
    #: newest checkpoints to keep, besides the best
    keep_checkpoints: int = setting(2, least=1, most=10_000, resume="free")
    #: steps; checkpoints at its multiples are never deleted; 0: none
    keep_every: int = setting(0, least=0, resume="free")
    #: consecutive skipped updates (loss or gradients not finite) tolerated
    max_skipped_steps: int = setting(8, least=1, resume="free")
    #: after more of them: return to the last good checkpoint, or stop
    on_skipped_steps: OnSkippedSteps = setting("rollback", resume="free")
    #: warn of a loss this many deviations above the running median; 0: never
    spike_sigmas: float = setting(6.0, least=0, resume="later")
    #: length of the text sampled at the end; 0: none
    sample_tokens: int = setting(64, least=0, most=10_000, resume="free")
    #: folder for compiled programs (moe.compilation_cache); empty: none
    compilation_cache: str = setting("auto", resume="free")
    #: of metrics, besides JSON lines: tensorboard, wandb, module:function
    writers: tuple[str, ...] = setting(("tensorboard",), resume="free")


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """Initial parameters (moe.training.warm_start).

    With a checkpoint, model fields that the config file or the command line does not set are the checkpoint's, and so
    is the tokenizer if data.tokenizer is empty.
    """

    checkpoint: str = ""  # workdir of a run or an import; empty: random parameters
    #: upcycling: normal noise on each copied expert, in standard deviations of its weights
    expert_noise: float = setting(0.0, least=0, most=1e3)
    virtual_groups: bool = False  # upcycling: one router column for the experts that together hold the dense FFN
    #: upcycling: factor of the copied down matrices; the number of shards keeps the output
    expert_scale: float = setting(1.0, least=0, most=1e3)
    #: upcycling: share of each expert's hidden units drawn anew (drop-upcycling: 0.5)
    drop_share: float = setting(0.0, least=0, most=1)
    fresh: tuple[Part, ...] = ()  # parts initialised at random instead of taken from the checkpoint
    optimizer: OptimizerState = "reset"  # optimizer state: new, or carried over from the checkpoint


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Distillation: a teacher's probabilities as targets besides the text (Switch 2021, section 4.2)."""

    teacher: str = ""  # workdir of a run or an import; empty: none
    #: share of the loss on the teacher's probabilities; the rest is on the text
    soft_share: float = setting(0.25, least=0, most=1)


@dataclasses.dataclass(frozen=True)
class PreferencesConfig:
    """Training on preferred answers (data.objective preferences); distill.teacher is the reference model."""

    beta: float = setting(0.1, above=0)  # weight of the log-probabilities against the reference's (DPO)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters over a fixed checkpoint, start.checkpoint (moe.models.adapters)."""

    rank: int = setting(0, least=0)  # columns of A; 0: no adapters, all parameters are trained
    alpha: float = setting(16.0, above=0)  # A B is multiplied by alpha / rank
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
