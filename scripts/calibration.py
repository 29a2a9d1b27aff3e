"""python scripts/calibration.py [--only=NAME] [--programs=DIR]: compare the planner with published train steps.

Compiles this project's train step for the model, slice and batch of each published step. Writes counted and published
seconds to moe/planner/calibration.json, from which plans take their interval, and the table predicted / published /
inside to docs/results/calibration.md. Rows that are there are not compiled again, unless --only names one: they, and
all kept plans, are counted anew from what is kept of their programs, by today's prices. --programs=DIR keeps the
compiled programs and reuses those of the same config, slice and versions. Needs libtpu and JAX's CUDA plugin:
pip install "jax[tpu]" "jax[cuda13]".

--check names the kept plans and steps whose numbers are not those of today's prices; the exit code is then 1.

--score compares docs/results/predictions.jsonl, plans that plan_pod.py --register wrote down before a number was known,
with the numbers that docs/results/outcomes.jsonl has since: coverage, log score and bias. Nothing is compiled.
"""

from pathlib import Path

from moe.system import process

if __name__ == "__main__":
    process.use_tpu_compiler()  # before JAX

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from absl import flags

from moe.programs import cli

_ONLY = flags.DEFINE_string("only", "", "Name of the row to make again; empty: all rows that are missing.")
_PROGRAMS = cli.define_path("programs", "Folder in which compiled programs are kept for reuse.")
_CHECK = flags.DEFINE_bool("check", False, "Name kept plans and steps that are not by today's prices; write nothing.")
_SCORE = flags.DEFINE_bool("score", False, "Score the registered predictions whose numbers were published.")

PAGE = Path(__file__).parents[1] / "docs" / "results" / "calibration.md"


@dataclasses.dataclass(frozen=True)
class Published:
    """One measurement, and our program to compare with it.

    Attributes:
        config: file in configs/.
        topology: slice of the run.
        rows: of the batch, per device; length: tokens of a row; accumulation: microbatches.
        model, moe, mesh: fields of the config.
        source: of the measurement.
        differs: what our program does differently.
        step: seconds of that batch; or
        tokens_per_second: per chip, as published; or
        tflops: TFLOP/s per chip as published, attention counted over all T keys.
        first_look: logarithm of published over counted time when the step was first compared, before any price was
            changed for it; None: not noted.
    """

    config: str
    topology: str
    rows: int
    length: int
    source: str
    differs: str
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    moe: dict[str, Any] = dataclasses.field(default_factory=dict)
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    accumulation: int = 1
    step: float = 0.0
    tokens_per_second: float = 0.0
    tflops: float = 0.0
    first_look: float | None = None


def _llama(d: int, layers: int, heads: int, kv_heads: int, d_ff: int, vocab: int) -> dict[str, Any]:
    return {
        "d_model": d, "num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 128,
        "d_ff": d_ff, "vocab_size": vocab, "remat": "full", "dtype": "bfloat16", "attention": "blocked",
    }  # fmt: skip


_CONFIGS = "github.com/AI-Hypercomputer/maxtext, src/maxtext/configs/tpu"
_RECIPES = "github.com/AI-Hypercomputer/tpu-recipes, training"
_BRIDGE = "github.com/NVIDIA-NeMo/Megatron-Bridge"
_DENSE = {"gate": "none"}

#: Cheapest to compile first.
PUBLISHED = {
    "Mixtral-8x7B, 64 H100": Published(
        "mixtral_8x7b", "h100:8x8", 2, 4096, "Megatron-Core, README of its MoE: 468 TFLOP/s per GPU",
        "fsdp 8 x expert 8, 2 rows per GPU, weights gathered every layer; theirs: parallelism and batch not stated",
        {"remat": "hidden"}, {"dispatch": "dropless"}, {"fsdp": 8, "expert": 8}, tflops=468,
        first_look=-0.350,
    ),
    "Llama 3.1 8B, v6e-8": Published(
        "base", "v6e:2x4", 3, 8192, f"{_RECIPES}/trillium/Llama3.1-8B-MaxText/v6e-8: 7138.89 tokens/s",
        "inputs of layers, queries, keys, values and attention outputs in the host's memory, as theirs",
        _llama(4096, 32, 32, 8, 14336, 128256) | {"remat": "offload"}, _DENSE, tokens_per_second=7138.89,
        first_look=-0.263,
    ),
    "Mixtral-8x7B, v5p-128": Published(
        "mixtral_8x7b", "v5p:4x4x4", 36, 4096, "MaxText, Run_Mixtral.md: 251.94 TFLOP/s, 54.89 % (all keys)",
        "4 microbatches of 9 rows, float32 parameters, cast before they are gathered; theirs: bfloat16",
        {"remat": "full"}, {"dispatch": "dropless"}, {"fsdp": 64, "expert": 1}, 4, tflops=251.94,
        first_look=0.046,
    ),
    "Mixtral-8x7B, v6e-256": Published(
        "mixtral_8x7b", "v6e:16x16", 12, 4096, f"{_RECIPES}/trillium/Mixtral-8x7B-MaxText: 13.484 s",
        "2 microbatches of 6 rows; queries, keys, values and inputs in the host's memory as theirs; also outputs of "
        "attention",
        {"remat": "offload"}, {"dispatch": "gather", "capacity": {"train": 1.25}}, {"fsdp": 256, "expert": 1}, 2,
        step=13.484,
        first_look=-0.243,
    ),
    "Qwen3-30B-A3B, 16 H100": Published(
        "qwen3_30b_a3b", "h100:2x8", 64, 4096,
        f"{_BRIDGE}, skills on expert-parallel overlap: 41.25 s by plain all-to-all, not overlapped (45.65 s in "
        "another run with CUDA graphs)",
        "64 microbatches of one row, recomputation of all but attention",
        {"remat": "attention"}, {"dispatch": "dropless"}, {"fsdp": 1, "expert": 16}, 64, step=41.25,
        first_look=-0.119,
    ),
    "Qwen3-30B-A3B, 16 H100, by host": Published(
        "qwen3_30b_a3b", "h100:2x8", 64, 4096,
        f"{_BRIDGE}, skills on performance: 24.71 s by HybridEP, which sends a token to a host once for all its "
        "experts there, not overlapped",
        "exchange_hosts=2, 64 microbatches of one row, recomputation of all but attention",
        {"remat": "attention"}, {"dispatch": "dropless", "exchange_hosts": 2}, {"fsdp": 1, "expert": 16}, 64,
        step=24.71,
        first_look=-0.133,
    ),
    "gpt-oss-120b, 64 B200": Published(
        "gpt_oss_120b", "b200:8x8", 8, 4096, f"{_BRIDGE}, performance summary of 25.11: 8213 tokens/s per GPU",
        "2 microbatches of 4 rows, weights gathered every layer; theirs: the same microbatches, weights of attention "
        "on every GPU",
        {"remat": "hidden"}, {"dispatch": "dropless"}, {"fsdp": 8, "expert": 8}, 2, tokens_per_second=8213,
        first_look=-0.175,
    ),
    "gpt-oss-120b, 64 B200, by host": Published(
        "gpt_oss_120b", "b200:8x8", 8, 4096, f"{_BRIDGE}, performance summary of 26.02.01: 13722 tokens/s per GPU",
        "exchange_hosts=8, 2 microbatches of 4 rows, full recomputation (hidden needs 202 GiB); theirs: the same "
        "microbatches, exchanged by HybridEP, which sends "
        "a token to a host once",
        {"remat": "full"}, {"dispatch": "dropless", "exchange_hosts": 8}, {"fsdp": 1, "expert": 64}, 2,
        tokens_per_second=13722,
    ),
    "gpt-oss-120b, 64 GB200": Published(
        "gpt_oss_120b", "gb200:16x4", 20, 8192, f"{_BRIDGE}, performance summary of 25.11: 15876 tokens/s per GPU",
        "20 microbatches of one row; theirs: the same, exchanged by HybridEP",
        {"remat": "hidden"}, {"dispatch": "dropless"}, {"fsdp": 1, "expert": 64}, 20, tokens_per_second=15876,
        first_look=0.237,
    ),
    "Qwen3-235B-A22B, 256 H100": Published(
        "qwen3_30b_a3b", "h100:32x8", 8, 4096,
        "github.com/yanring/Megatron-MoE-ModelZoo, best_practice/Qwen3: 17.6 s, FSDP, 8 experts per host, DeepEP",
        "one batch of 8 rows per GPU, full recomputation; theirs: the same tokens over 2 GPUs by tensor parallelism",
        {"d_model": 4096, "num_layers": 94, "num_heads": 64, "remat": "full"},
        {"dispatch": "dropless", "d_ff": 1536}, {"fsdp": 32, "expert": 8}, step=17.6,
        first_look=-0.467,
    ),
    "Mixtral-8x22B, v6e-256": Published(
        "mixtral_8x22b", "v6e:16x16", 8, 4096, f"{_RECIPES}/trillium/Mixtral-8x22B-MaxText: 24.706 s",
        "4 microbatches of 2 rows, inputs, queries, keys, values and attention outputs in the host's memory, float32 "
        "parameters; theirs: one of 8 rows, which gathers weights a quarter as often",
        {"remat": "offload"}, {"dispatch": "gather", "capacity": {"train": 1.25}}, {"fsdp": 64, "expert": 4}, 4,
        step=24.706,
        first_look=-0.452,
    ),
    "dense 16B, v5e-256": Published(
        "base", "v5e:16x16", 6, 2048, f"{_CONFIGS}/v5e: 120 TFLOP/s, 61.10 % (16b.sh)",
        "the same batch and full recomputation", _llama(4096, 32, 64, 64, 28672, 32000), _DENSE, tflops=0.6110 * 197,
        first_look=-0.121,
    ),
    "Llama 2 70B, v5p-128": Published(
        "base", "v5p:4x4x4", 4, 4096, f"MaxText, run_llama2.md: 65 % ({_CONFIGS}/v5p/llama2_70b.sh)",
        "full recomputation (remat=attention needs 99 GiB); theirs repeats only the projections into the FFN",
        _llama(8192, 80, 64, 8, 28672, 32000), _DENSE, tflops=0.65 * 459,
        first_look=0.024,
    ),
    "DeepSeek-V3, v5p-1024": Published(
        "deepseek_v3", "v5p:8x8x8", 6, 8192, f"{_RECIPES}/v5p/DeepSeek3-671B-MaxText: 90.668 s",
        "2 microbatches of 3 rows; inputs, queries, keys, values and attention outputs in the host's memory",
        {"remat": "offload"}, {"dispatch": "dropless"}, {"fsdp": 512, "expert": 1}, 2, step=90.668,
    ),
    "DeepSeek-V3, 128 tpu7x": Published(
        "deepseek_v3", "tpu7x:4x4x8", 8, 4096, f"{_RECIPES}/ironwood: 27.02 s",
        "2 microbatches of 4 rows, inputs of layers in the host's memory as theirs, float32 first moment",
        {"remat": "offload_inputs"}, {"dispatch": "dropless"}, {"fsdp": 256, "expert": 1}, 2, step=27.02,
    ),
}  # fmt: skip

LEFT_OUT = """The B200 row of 25.11 is one program of ours that gathers weights every layer. For the same model, GPUs
and microbatches, release 26.02.01 publishes 13,722 tokens/s, 1.67 times as many: outside the interval of that program.

One step of Kimi-K2 is public: 6.4 % MFU on 256 tpu7x chips, with Muon and dense matmuls instead of a kernel for grouped
ones, so that experts multiply padded buffers. Our plan for v5p states five times that, for dropless kernels and AdamW:
the two are not the same program, and the step is not compared.

Published steps that are not compared: 8 of 8 experts against 14 of 56 on v5p (measured without attention,
batch not stated); Llama 3.1 70B on 64 tpu7x (neither rows nor recomputation stated); Qwen3-30B on 16 H100 with the
exchange of one microbatch overlapped with the work of another (31.3 s; 21.0 s by HybridEP), where ours overlaps with
the experts alone; pipelines and float8 (most other rows of NVIDIA)."""


def outside(rows: Sequence[dict[str, Any]]) -> str:
    """The reason why Mixtral-8x22B on v6e lies outside of its interval, as a paragraph."""
    (row,) = (each for each in rows if each["name"] == "Mixtral-8x22B, v6e-256")
    return (
        "Mixtral-8x22B on v6e lies outside, with rings counted by their phases. Its work alone is counted at "
        f"{row['counted'] - row['exposed']:.1f} s, the published step at {row['published']:.1f}: what our program "
        f"takes more is the {row['exposed']:.1f} s that it waits for exchange, mostly of weights and their gradients, "
        "which four microbatches gather four times as often as the published one."
    )


def config_of(row: Published, devices: int) -> Any:
    """The config of our program."""
    from moe.config import load_python_file
    from moe.config.parse import from_config_dict

    config: Any = load_python_file(PAGE.parents[2] / "configs" / f"{row.config}.py").get_config()
    config.model.update(row.model)
    config.model.moe.update(row.moe)
    config.data.sequence_length = row.length
    config.train.batch_size = row.rows * devices
    config.train.accumulation_steps = row.accumulation
    config.mesh.update({"data": 1, "fsdp": devices, "expert": 1, **row.mesh})
    return from_config_dict(config)


def published_seconds(row: Published, config: Any, chips: int) -> float:
    """Seconds that the published rate takes for our batch."""
    from moe.models import flops

    if row.step:
        return row.step
    model, length = config.model, row.length
    # 2 matmuls x 2 FLOPs x 3 passes for the T - (T+1)/2 keys that a causal query does not see.
    unseen = 12 * model.num_layers * model.num_heads * model.head_dim * (length - 1) / 2
    all_keys = flops.train_flops_per_token(model, length) + unseen
    rate = row.tokens_per_second or row.tflops * 1e12 / all_keys
    return config.train.batch_size * length / rate / chips


def compare(name: str, folder: Path | None) -> dict[str, Any]:
    """Compile one program, or read it if it is kept, and return its row of the table."""
    from moe.planner import compiled, make_plan, topology

    row = PUBLISHED[name]
    where = topology.get_topology(row.topology)
    config = config_of(row, len(where.devices))
    made = make_plan.read_step(config, where, compiled.read_or_compile(config, where, folder, apart=True))
    published = published_seconds(row, config, made.chips)
    return {
        "name": name,
        "platform": made.platform,
        "topology": row.topology,
        "counted": made.counted_seconds,
        "floor": made.floor_seconds,
        "low": made.counted_seconds - made.kernel_seconds + made.kernel_low,
        "high": made.counted_seconds - made.kernel_seconds + made.kernel_high,
        "published": published,
        "residual": math.log(published / made.counted_seconds),
        "mfu": made.model_flops / (made.counted_seconds * made.peak_flops),
        "memory_gib": made.memory.total / 2**30,
        "exposed": made.exposed_seconds,
        "counts": made.counts,
        "versions": list(made.versions),
        "commit": made.commit,
        "prices": made.prices,
    }


def main() -> None:
    """Make what is missing; the page is written again after every row."""
    from moe.config import ConfigError
    from moe.planner import calibration, register

    if _SCORE.value:
        print(register.report(PAGE.with_name("predictions.jsonl"), PAGE.with_name("outcomes.jsonl")))
        return
    if _ONLY.value and _ONLY.value not in PUBLISHED:
        raise ConfigError(f"--only={_ONLY.value}: must be one of {'; '.join(PUBLISHED)}")
    folder = Path(_PROGRAMS.value) if _PROGRAMS.value else None
    known = {row["name"]: row for row in calibration.rows()}
    if _CHECK.value:
        check(list(known.values()))
        return
    write(known)
    for name in [_ONLY.value] if _ONLY.value else [name for name in PUBLISHED if name not in known]:
        try:
            made = compare(name, folder)
        except ConfigError as error:
            print(f"{name}: {error}")
            continue
        known = {row["name"]: row for row in calibration.rows()} | {name: made}  # another process may have written
        write(known)
        print(f"{name}: counted {known[name]['counted']:.3g} s, published {known[name]['published']:.3g} s")


def kernel_lines() -> list[str]:
    """Errors of the prices of grouped matmuls on timings that are left out, by device, as Markdown."""
    from moe.planner import measured
    from moe.system.escaping import markdown_table

    found = {matrices: measured.errors(matrices=matrices) for matrices in (False, True)}
    cells = []
    for name, table in measured.DEVICES.items():
        row = [name, str(sum(timing.device == table for timing, *_ in found[False]))]
        for errors in found.values():
            own = [(abs(error), inside) for timing, error, inside in errors if timing.device == table]
            row += [f"{statistics.median(size for size, _ in own):.2f}", f"{statistics.mean(i for _, i in own):.0%}"]
        cells.append(row)
    head = "device", "timings", "shape left out: median |log error|", "inside", "all of its matrices left out", "inside"
    return [
        "## Kernels",
        "",
        "Prices of grouped matmuls against published timings that were left out of the fit"
        " ([estimates](estimates.md#grouped-matmuls)). Intervals are made for 80 % inside.",
        "",
        markdown_table(head, cells),
    ]


def by_shapes_lines() -> list[str]:
    """The published steps priced by shapes, those that were not compiled included, as Markdown."""
    from moe.interop.config_json import write_config
    from moe.planner import by_shapes, open_shapes, topology
    from moe.system.escaping import markdown_table

    cells, errors, inside = [], [], 0
    for name, row in PUBLISHED.items():
        where = topology.get_topology(row.topology, compiles=False)
        config = config_of(row, len(where.devices))
        made = by_shapes.make(open_shapes.read(write_config(config)), where, row.rows, row.length)
        published, (low, high) = published_seconds(row, config, where.num_chips), made.step_interval
        errors.append(math.log(published / made.step_seconds))
        inside += low <= published <= high
        step = f"{made.step_seconds:.3g}", f"{low:.3g} to {high:.3g}", f"{published:.3g}"
        cells.append((name, *step, "yes" if low <= published <= high else "no", f"{errors[-1]:+.2f}"))
    mean = sum(map(abs, errors)) / len(errors)
    head = "model", "by shapes, s", "80 % interval, s", "published, s", "inside", "log(published / by shapes)"
    return [
        "## By shapes",
        "",
        "The same steps by the shapes of their matrices alone, with recomputed layers and without exchanged tokens",
        "(`moe plan --hf`, [plans](../pods.md#any-published-model)). The published numbers went into these intervals",
        "through the spread of the table above, and not into the prices.",
        "",
        markdown_table(head, cells),
        "",
        f"Inside: {inside} of {len(cells)}. Mean |log error| {mean:.2f}.",
    ]


def write(known: dict[str, Any]) -> None:
    """Write the rows and the page."""
    from moe.planner import calibration, kept_plans
    from moe.system.atomic_files import write_atomic

    rows = [calibration.recounted(known[name]) for name in PUBLISHED if name in known]
    write_atomic(calibration.PATH, json.dumps(rows, indent=1) + "\n")
    sources = [f"- {name}: {own.source}. Here: {own.differs}." for name, own in PUBLISHED.items()]
    missing = [name for name in PUBLISHED if name not in known]
    first = {name: own.first_look for name, own in PUBLISHED.items() if own.first_look is not None}
    parts = [*kernel_lines(), "", *by_shapes_lines()]
    write_atomic(PAGE, calibration.page(rows, first, missing, [*sources, "", outside(rows), "", LEFT_OUT, "", *parts]))
    root = PAGE.parents[2]
    kept_plans.recount(root / "configs" / "plans.json", root / "docs" / "results" / "plans.md")


def check(rows: list[dict[str, Any]]) -> None:
    """Compare the kept plans and steps with today's prices; the exit code is 1 if any differs."""
    from moe.planner import calibration, kept_plans

    plans = kept_plans.read(PAGE.parents[2] / "configs" / "plans.json")
    stale = [f"plan of {name}" for name in kept_plans.stale(plans, rows)]
    stale += [f"step of {name}" for name in calibration.stale(rows)]
    for each in stale:
        print(f"not by today's prices: {each}")
    if stale:
        raise SystemExit(1)
    print(f"{len(plans)} plans and {len(rows)} published steps are counted by today's prices")


if __name__ == "__main__":
    cli.run(
        main,
        examples=(
            "python scripts/calibration.py",
            "python scripts/calibration.py --only=NAME",
            "python scripts/calibration.py --check",
        ),
    )
