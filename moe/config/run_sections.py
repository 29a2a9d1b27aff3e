"""The sections of a run besides the model: data, mesh, optimizer, training, start; and the rules inside each."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Literal

from moe.config.objectives import OBJECTIVES
from moe.config.references import check_path
from moe.system.fields import Section, require, setting

OnSkippedSteps = Literal["rollback", "stop"]
OptimizerState = Literal["reset", "carry"]
Schedule = Literal["cosine", "constant", "wsd", "rsqrt"]
MomentDType = Literal["float32", "bfloat16"]
StateMemory = Literal["device", "host"]
#: How a policy's loss is averaged: over all tokens of a batch (DAPO); over the tokens of each completion, then over
#: completions (GRPO); or over completions, each the sum over its tokens divided by a constant (Dr. GRPO).
PolicyMean = Literal["tokens", "completions", "constant"]

#: Largest number of tokens in the shuffle buffers (about 4 GiB), and in one domain's held-out rows; both are kept in
#: memory.
_MAX_BUFFERED_TOKENS, _MAX_HELDOUT_TOKENS = 2**28, 2**24

#: Default of data.domains for the embedded corpus.
EMBEDDED_DOMAINS = ("literature", "python")


@dataclasses.dataclass(frozen=True)
class DataConfig(Section, path="data."):
    """Text datasets, tokenizer, objective, and packed rows."""

    #: "embedded", a folder (/..., ./..., gs://...) or a prepared TFDS dataset; or several, a,b
    dataset: str = setting("embedded", neutral=None)
    #: domains to use; empty: all, of "embedded" literature and python
    domains: tuple[str, ...] = setting((), neutral=None)
    text_suffixes: tuple[str, ...] = ()  # suffixes of text files in a folder, as ".tex", besides .txt, .md, .py, ...
    weights: tuple[float, ...] = ()  # share of rows per domain; empty: equal
    directory: str = setting("~/.cache/moe-data", resume="free")  # for prepared datasets, downloads and tokenizers
    tokenizer: str = ""  # a tokenizer.model, a tokenizer.json or "mixtral"; empty: one of model.vocab_size is trained
    chat_template: str = ""  # objective chat: a file with a Jinja template; empty: that of the tokenizer
    #: what is predicted: causal, prefix_lm, span_corruption (with an encoder instead of causal), pairs, chat,
    #: preferences, policy, or module:object (docs/own_objectives.md)
    objective: str = setting("causal", follows="model.encoder_layers")
    sequence_length: int = setting(256, least=2, most=2**24, unit="tokens", neutral=None)  # T
    #: U, of an encoder's row; 0: sequence_length where there is an encoder
    input_length: int = setting(0, least=0, most=2**24, follows="data.sequence_length", unit="tokens")
    pack: bool = True  # rows of whole examples (all but causal and prefix_lm decoders) hold several; False: one each
    corruption_rate: float = setting(0.15, above=0, below=1)  # span_corruption: share of the tokens that is removed
    mean_span: float = setting(3.0, least=1, unit="tokens")  # span_corruption: mean length of a removed span
    #: independent document streams per batch, whole ones for each process; 0: gcd(8, batch_size), or as many as needed
    streams: int = setting(0, least=0, most=2**16)
    shuffle_window: int = setting(512, least=1, unit="rows")  # in the shuffle buffers of all streams
    heldout_rows: int = setting(64, least=1, unit="rows", result="none")  # of T tokens, per domain, in each evaluation

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.dataset.split(","):
            self._require("dataset", name != "", "must name a dataset, or several separated by commas")
            check_path("data.dataset", name)
        self._require("directory", self.directory != "", "must name a folder; '.' is the current one")
        check_path("data.directory", self.directory)
        check_path("data.tokenizer", self.tokenizer)
        once = len(set(self.domains)) == len(self.domains) and all(self.domains)
        self._require("domains", once, "must name each domain once")
        text = all(re.fullmatch(r"\.\w+", suffix) for suffix in self.text_suffixes)
        text = text and not {".jsonl", ".parquet", ".arrow"} & {suffix.lower() for suffix in self.text_suffixes}
        self._require("text_suffixes", text, "must be suffixes of plain-text files, such as '.tex'")
        shares = len(self.weights) in (0, len(self.domains) or len(self.weights))
        allowed = f"must be empty or one positive share for each of the {len(self.domains)} domains"
        self._require("weights", shares and all(weight > 0 for weight in self.weights), allowed)
        known = self.objective in OBJECTIVES or ":" in self.objective
        self._require("objective", known, f"must be one of {', '.join(OBJECTIVES)}, or module:object")
        length = self.sequence_length
        for name, most in (("shuffle_window", _MAX_BUFFERED_TOKENS), ("heldout_rows", _MAX_HELDOUT_TOKENS)):
            allowed = f"must be at most {most // length} with data.sequence_length={length}: rows are kept in memory"
            self._require(name, getattr(self, name) * length <= most, allowed)


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section, path="mesh."):
    """Devices per mesh axis; one size may be -1: all remaining devices."""

    data: int = setting(-1, resume="free")  # splits rows
    fsdp: int = setting(1, resume="free")  # splits rows, and parameters over D
    expert: int = setting(1, resume="free")  # splits rows, and experts over E
    tensor: int = setting(1, resume="free")  # splits heads and F
    context: int = setting(1, resume="free")  # splits the positions of a row
    pipeline: int = setting(1, resume="free")  # splits layers into stages, through which microbatches pass

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {axis.name: getattr(self, axis.name) for axis in dataclasses.fields(self)}
        for axis, size in sizes.items():
            self._require(axis, size == -1 or size >= 1, "must be positive, or -1 to use all remaining devices")
        filled = [axis for axis, size in sizes.items() if size == -1]
        require(len(filled) <= 1, "mesh", filled, "only one axis can be -1")


#: Parts of a model that optimizer.frozen and start.fresh can name. Each parameter belongs to one: relative biases and
#: norms inside attention to attention, norms before and after layers to norms, a shared expert's FFN to shared.
Part = Literal[
    "embedding", "unembedding", "memory", "attention", "dense", "router", "experts", "shared", "latent", "null", "norms"
]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section, path="optimizer."):
    """The optimizer, and the learning-rate schedule."""

    name: str = "adamw"  # adamw, adafactor, muon, or module:function (see moe.training.optimizer.Factory)

    learning_rate: float = setting(3e-3, above=0, most=1e3, resume="later", neutral=None)  # peak
    #: after a linear warm-up: cosine decay, constant, or wsd (constant, then a decay); rsqrt: the peak, then 1/√step
    schedule: Schedule = setting("cosine", resume="later")
    #: share of the peak that wsd reaches at the last step, and that cosine would reach at the step after the last
    final_learning_rate_fraction: float = setting(0.1, least=0, most=1, resume="later")
    #: of the linear rise to the peak
    warmup_steps: int = setting(30, least=0, resume="later", unit="steps", neutral=None)
    decay_steps: int = setting(0, least=0, resume="later", unit="steps")  # of wsd's decay; 0: a tenth of num_steps
    b1: float = setting(0.9, share=True, resume="later")  # adamw: decay of the first moment
    b2: float = setting(0.95, share=True, resume="later")  # adamw: decay of the second moment
    eps: float = setting(1e-8, above=0, resume="later")  # adamw: added to the root of the second moment
    weight_decay: float = setting(0.1, least=0, most=1e3, resume="later")  # of matrices only
    gradient_clip: float = setting(1.0, least=0)  # largest global norm; 0: no clipping
    moment_dtype: MomentDType = "float32"  # in which moments are stored; adamw and muon also in bfloat16
    #: where the optimizer's arrays stay between updates
    memory: StateMemory = setting("device", resume="free")
    frozen: tuple[Part, ...] = ()  # parts that are not trained
    #: decay per step of a moving average of the weights, which is evaluated too; 0: no average
    ema_decay: float = setting(0.0, share=True)
    #: standard deviations above the mean of the last 128 steps from which a loss or gradient norm is a spike, whose
    #: update is skipped (OLMo-core: 6); 0: none is
    skip_sigmas: float = setting(0.0, least=0, most=1e6)
    #: largest attention score of a head in a step, above which its queries and keys are scaled down (Kimi K2's QK-clip:
    #: 100); 0: none
    qk_clip: float = setting(0.0, least=0, most=1e6)
    muon_heads: bool = False  # muon: each head of attention is a matrix of its own (GLM-5), instead of all heads

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("muon_heads", self.name == "muon" or not self.muon_heads, "needs optimizer.name=muon")
        wsd = self.decay_steps == 0 or self.schedule == "wsd"
        averages = self.memory == "device" or not self.ema_decay
        self._require("memory", averages, "must be device with optimizer.ema_decay, whose average is evaluated")
        self._require("decay_steps", wsd, "must be 0 unless optimizer.schedule is 'wsd'")
        if self.moment_dtype == "float32":
            return
        allowed = f"must be float32 with optimizer.name={self.name}; adamw and muon have bfloat16 moments"
        self._require("moment_dtype", self.name in ("adamw", "muon"), allowed)
        # A second moment changes by up to a share 1 - b2 of itself; bfloat16 rounds changes below 1/256 away.
        allowed = f"must be float32 with optimizer.b2={self.b2}; bfloat16 keeps second moments up to b2=0.99"
        self._require("moment_dtype", self.b2 <= 0.99, allowed)

    def wsd_steps(self, num_steps: int) -> int:
        """Steps of wsd's decay in a run of ``num_steps``; by default none in a run of one step, which has the peak."""
        return self.decay_steps or max(num_steps // 10, min(num_steps - 1, 1))


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section, path="train."):
    """Training loop."""

    num_steps: int = setting(320, least=1, resume="later", unit="steps", neutral=None)  # of the optimizer
    #: B, of T tokens, per optimizer step, over all devices
    batch_size: int = setting(8, least=1, most=2**24, unit="rows", neutral=None)
    accumulation_steps: int = setting(1, least=1, unit="microbatches")  # per optimizer step; divides batch_size
    #: batch ramp-up: rows of the first steps' batches, in stages; each a multiple of a microbatch's rows; (): none
    rampup_rows: tuple[int, ...] = ()
    rampup_steps: tuple[int, ...] = ()  # number of steps of each of these stages, before those of batch_size
    #: times that a microbatch passes all stages of mesh.pipeline, each of which holds as many groups of layers
    pipeline_rounds: int = setting(1, least=1, resume="free")
    log_every: int = setting(10, least=1, resume="free", unit="steps")  # between rows of metrics
    #: between evaluations on held-out text; the last step always evaluates
    eval_every: int = setting(80, least=1, resume="free", unit="steps")
    #: between checkpoints; the last step always saves
    save_every: int = setting(80, least=1, resume="free", unit="steps")
    #: newest checkpoints to keep, besides the best
    keep_checkpoints: int = setting(2, least=1, most=10_000, resume="free")
    #: checkpoints at its multiples are never deleted; 0: none
    keep_every: int = setting(0, least=0, resume="free", unit="steps")
    #: consecutive skipped updates (loss or gradients not finite, or a spike) at which on_skipped_steps applies
    max_skipped_steps: int = setting(8, least=1, resume="free")
    #: after that many: return to the last good checkpoint, or stop
    on_skipped_steps: OnSkippedSteps = setting("rollback", resume="free")
    #: without a sign of life from a process after which a run of several ends with exit code 75
    host_timeout: int = setting(100, least=10, most=86_400, resume="free", unit="seconds")
    #: warn of a loss this many deviations above the running median; 0: never
    spike_sigmas: float = setting(6.0, least=0, resume="later", result="none")
    #: length of the text sampled at the end; 0: none
    sample_tokens: int = setting(64, least=0, most=10_000, resume="free")
    #: folder for compiled programs (moe.system.compilation_cache); empty: none
    compilation_cache: str = setting("auto", resume="free")
    #: of metrics, besides JSON lines: tensorboard, wandb, module:function
    writers: tuple[str, ...] = setting(("tensorboard",), resume="free")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("train.compilation_cache", self.compilation_cache)
        allowed = f"must be 0 or a multiple of train.save_every={self.save_every}"
        self._require("keep_every", self.keep_every % self.save_every == 0, allowed)
        divides = self.batch_size % self.accumulation_steps == 0
        self._require("accumulation_steps", divides, f"must divide train.batch_size={self.batch_size}")
        self._check_rampup()

    def _check_rampup(self) -> None:
        rows, steps = self.rampup_rows, self.rampup_steps
        unit = self.microbatch_rows
        allowed = (
            f"must be increasing multiples of train.batch_size / train.accumulation_steps = {unit}, the rows of a "
            f"microbatch, below train.batch_size={self.batch_size}"
        )
        grows = all(low < high for low, high in itertools.pairwise((0, *rows, self.batch_size)))
        self._require("rampup_rows", grows and all(number % unit == 0 for number in rows), allowed)
        each = len(steps) == len(rows) and all(number > 0 for number in steps)
        allowed = f"must be a positive number of steps for each of the {len(rows)} stages of train.rampup_rows"
        self._require("rampup_steps", each, allowed)
        allowed = f"must add up to less than train.num_steps={self.num_steps}"
        self._require("rampup_steps", sum(steps) < self.num_steps, allowed)

    @property
    def microbatch_rows(self) -> int:
        """Rows of one microbatch, over all devices."""
        return self.batch_size // self.accumulation_steps

    @property
    def rows_read(self) -> int:
        """Rows that are read at once, over all devices: a batch, or a microbatch if batches grow."""
        return self.microbatch_rows if self.rampup_rows else self.batch_size

    def rows_until(self, step: int) -> int:
        """Rows of the batches of the first steps, up to this one."""
        rows, before = 0, 0
        for size, number in zip(self.rampup_rows, self.rampup_steps, strict=True):
            rows += size * min(max(step - before, 0), number)
            before += number
        return rows + self.batch_size * max(step - before, 0)

    def batches_until(self, step: int) -> float:
        """Rows of the batches of the first steps, in batches of ``batch_size``."""
        return self.rows_until(step) / self.batch_size

    def rows_at(self, step: int) -> int:
        """Rows of the batch of a step; steps count from 1."""
        return self.rows_until(step) - self.rows_until(step - 1)

    def of_rows(self, rows: int, accumulation_steps: int) -> TrainConfig:
        """The section with batches of so many rows in every step."""
        return dataclasses.replace(
            self, batch_size=rows, accumulation_steps=accumulation_steps, rampup_rows=(), rampup_steps=()
        )


@dataclasses.dataclass(frozen=True)
class StartConfig(Section, path="start."):
    """Initial parameters (moe.training.warm_start).

    With a checkpoint, model fields that the config file or the command line does not set are the checkpoint's, and so
    is the tokenizer if data.tokenizer is empty.
    """

    checkpoint: str = ""  # workdir of a run or an import; empty: random parameters
    #: upcycling: normal noise on each copied expert, in standard deviations of its weights
    expert_noise: float = setting(0.0, least=0, most=1e3)
    virtual_groups: bool = False  # upcycling: equal router columns for the experts that together hold the dense FFN
    #: upcycling: factor of the copied down matrices; the number of shards preserves the dense output
    expert_scale: float = setting(1.0, least=0, most=1e3)
    #: upcycling: share of each expert's hidden units drawn anew (drop-upcycling: 0.5)
    drop_share: float = setting(0.0, least=0, most=1)
    fresh: tuple[Part, ...] = ()  # parts initialised at random instead of taken from the checkpoint
    optimizer: OptimizerState = "reset"  # optimizer state: new, or carried over from the checkpoint

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("start.checkpoint", self.checkpoint)


@dataclasses.dataclass(frozen=True)
class DistillConfig(Section, path="distill."):
    """Distillation: a teacher's probabilities as targets besides the text (Switch 2021, section 4.2)."""

    teacher: str = ""  # workdir of a run or an import; empty: none
    #: share of the loss on the teacher's probabilities; the rest is on the text
    soft_share: float = setting(0.25, least=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("distill.teacher", self.teacher)


@dataclasses.dataclass(frozen=True)
class PreferencesConfig(Section, path="preferences."):
    """Training on preferred answers (data.objective preferences); distill.teacher is the reference model."""

    beta: float = setting(0.1, above=0)  # factor of the log-probability ratio to the reference model (DPO)


@dataclasses.dataclass(frozen=True)
class PolicyConfig(Section, path="policy."):
    """Reinforcement learning from rollouts (data.objective policy): GRPO and its variants (moe.objectives.grpo)."""

    #: a token's probability ratio is clipped from below at 1 - this
    clip_low: float = setting(0.2, above=0, most=1)
    clip_high: float = setting(0.2, above=0)  # and from above at 1 + this; DAPO: 0.28
    kl: float = setting(0.0, least=0)  # weight of the divergence from the reference model, distill.teacher
    mean: PolicyMean = "tokens"  # over tokens (DAPO), completions (GRPO), or a constant (Dr. GRPO)
    divide_by_deviation: bool = True  # divide advantages by the deviation of their group's rewards; Dr. GRPO: False
    replay: bool = True  # use the experts that the rollouts recorded, in the policy and in the reference


@dataclasses.dataclass(frozen=True)
class LoraConfig(Section, path="lora."):
    """Low-rank adapters over a fixed checkpoint, start.checkpoint (moe.models.adapters)."""

    rank: int = setting(0, least=0)  # columns of A; 0: no adapters, all parameters are trained
    alpha: float = setting(16.0, above=0)  # A B is multiplied by alpha / rank
    parts: tuple[Part, ...] = ("attention", "dense", "experts", "shared", "latent")  # whose matrices have adapters
    trained: tuple[Part, ...] = ()  # parts that are trained in full besides the adapters, such as router
    common_a: bool = False  # all experts of a layer have one A, and a B each

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("parts", bool(self.parts) or not self.rank, "must name at least one part")
        adapted = ("attention", "dense", "experts", "shared", "latent")
        allowed = f"must be among {', '.join(adapted)}; lora.trained takes the others"
        self._require("parts", set(self.parts) <= set(adapted), allowed)
        self._require("common_a", "experts" in self.parts or not self.common_a, "needs experts among lora.parts")
