"""python scripts/gpu_report.py [--name=h100]: everything that compiling for absent GPUs cannot tell, on one real GPU.

Parity with the per-token oracle, the kernels of grouped matmuls against plain matmuls, Mixtral's layer against the
measured matmul rate and PyTorch's grouped matmul (if PyTorch is installed), a 4-layer model's train step, cuDNN's
attention, and a profile, in under eight minutes. Writes docs/results/gpu/NAME.md. `--dry` runs the same functions on
tiny shapes on any machine, to see that the script works; it prints a page without numbers and writes nothing.
"""

import os
import sys
from pathlib import Path

from moe.system import process

if __name__ == "__main__":
    process.prepare()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from moe.lab.benchmarks.gpu_sizes import Sizes
from moe.programs import cli

_NAME = flags.DEFINE_string("name", "", "Name of the page; empty: from the GPU's name.")
_DRY = flags.DEFINE_bool("dry", False, "Tiny shapes on any machine; print a page without numbers, write nothing.")
_CALLS = flags.DEFINE_integer("calls", 9, "Timed calls of each program.", lower_bound=1)

FOLDER = Path(__file__).parents[1] / "docs" / "results" / "gpu"

#: Mixtral-8x7B's layer has to reach this share of the measured matmul rate.
BAR = 0.6

TINY = Sizes(128, 32, 64, 4, 2, 16, 2, 32, 64, 256, "float32", 64)


def device(sizes: Sizes) -> Iterator[str]:
    """The device, its measured rates and the software."""
    import jax

    from moe.training.profiling import measured_matmul_rate

    found, side = jax.devices()[0], sizes.side
    rate = measured_matmul_rate(sizes.dtype, size=side)
    peak = _peak()
    of_peak = f", {rate / peak:.2f} of the datasheet's" if peak else ""
    yield f"- {found.device_kind}, {found.client.platform_version.splitlines()[0]}"
    yield f"- jax {jax.__version__}"
    yield f"- matmul of {side} x {side} in {sizes.dtype}: {rate / 1e12:.0f} TFLOP/s{of_peak}"


def parity(sizes: Sizes) -> Iterator[str]:
    """The layer against the per-token oracle, in values and gradients, in every dispatch mode and precision."""
    import jax

    from moe.conformance import oracle
    from moe.conformance.oracle_cases import Case

    del sizes
    # Rows, D and F are multiples of 16, so that the kernels run; without TF32.
    case = Case("mixtral", 2, 32, 8, 2, 12, 0.2)
    with jax.default_matmul_precision("highest"):
        rows = list(oracle.against_oracle(case, seed=0, d=32, f=48))
    yield "| layer | bound | error | |"
    yield "|---|---|---|---|"
    yield from (
        f"| {row.what} | {row.expected} | {row.measured} | {'pass' if row.passes else 'FAIL'} |" for row in rows
    )
    if not all(row.passes for row in rows):
        raise AssertionError("a layer differs from the oracle")


def layer(sizes: Sizes) -> Iterator[str]:
    """Mixtral's layer, router and losses included, against the matmul rate measured in turns with it."""
    from moe.lab.benchmarks import layer_programs, timing

    cases = {mode: _case(sizes, mode) for mode in ("dropless", "gather")}
    yield "| mode | pass | ms, median (minimum) | active TFLOP/s | of the matmul rate |"
    yield "|---|---|---|---|---|"
    for mode, case in cases.items():  # one at a time: each has 11 GiB of parameters and gradients
        programs: dict[str, Callable[[], Any]]
        programs, _ = layer_programs.layer(case)
        times = timing.in_turns(
            programs | {"matmul": layer_programs.large_matmul(sizes.side, sizes.dtype)}, _CALLS.value
        )
        rate = 2 * sizes.side**3 / statistics.median(times.pop("matmul").clock)
        for which, seconds in times.items():
            median, flops = statistics.median(seconds.clock), layer_programs.active_flops(case)[which]
            share = flops / median / rate
            verdict = f" (bar {BAR}: {'met' if share >= BAR else 'not met'})" if which == "both" else ""
            yield (
                f"| {mode} | {which} | {1e3 * median:.2f} ({1e3 * min(seconds.clock):.2f}) | "
                f"{flops / median / 1e12:.0f} | {share:.2f}{verdict} |"
            )


def pytorch(sizes: Sizes) -> Iterator[str]:
    """Grouped matmuls of PyTorch and of this project: one product of [R,D] rows with [E,D,F] matrices."""
    import jax
    import jax.numpy as jnp

    from moe.dispatch.backends import gpu, tpu
    from moe.lab.benchmarks import timing

    num_rows, experts = 2 * sizes.tokens, sizes.experts
    rows = jnp.ones((num_rows, sizes.d_model), sizes.dtype)
    matrices = jnp.ones((experts, sizes.d_model, sizes.d_ff), sizes.dtype)
    counts = jnp.full((experts,), num_rows // experts, jnp.int32)
    ours = jax.jit(gpu.grouped_matmul if gpu.supports(rows, matrices) else tpu.grouped_matmul)
    flops = 2 * num_rows * sizes.d_model * sizes.d_ff
    seconds = statistics.median(
        timing.in_turns({"ours": lambda: ours(rows, matrices, counts)}, _CALLS.value)["ours"].clock
    )
    yield f"- this project: {1e3 * seconds:.3f} ms, {flops / seconds / 1e12:.0f} TFLOP/s"
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        yield "- PyTorch is not installed: not compared"
        return
    if not (torch.cuda.is_available() and hasattr(torch, "_grouped_mm")):
        yield f"- PyTorch {torch.__version__} has no grouped matmul on this device: not compared"
        return
    a = torch.ones(num_rows, sizes.d_model, device="cuda", dtype=torch.bfloat16)
    b = torch.ones(experts, sizes.d_model, sizes.d_ff, device="cuda", dtype=torch.bfloat16)
    ends = torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * (num_rows // experts)
    times = []
    for _ in range(_CALLS.value + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch._grouped_mm(a, b, offs=ends)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    yield f"- PyTorch {torch.__version__}: {1e3 * seconds:.3f} ms, {flops / seconds / 1e12:.0f} TFLOP/s"


def attention(sizes: Sizes) -> Iterator[str]:
    """Attention over packed documents: parity with the plain form, and its rate."""
    import jax
    import jax.numpy as jnp

    from moe.lab.benchmarks import timing
    from moe.layers.attention.attend import attend, runs_cudnn
    from moe.layers.attention.scoring import Scoring

    keys = jax.random.split(jax.random.key(0), 3)
    heads = (sizes.heads, sizes.heads // 2, sizes.heads // 2)
    query, key, value = (
        jax.random.normal(k, (sizes.rows, sizes.tokens, n, sizes.head_dim), sizes.dtype)
        for k, n in zip(keys, heads, strict=True)
    )
    documents = jnp.broadcast_to(jnp.arange(sizes.tokens) // (sizes.tokens // 3) + 1, query.shape[:2])

    def both(query: Any, key: Any, value: Any, documents: Any, kind: str) -> Any:
        y, pull = jax.vjp(lambda q, k, v: attend(q, k, v, documents, kind=kind, scoring=Scoring()), query, key, value)
        return y, pull(y)

    run = jax.jit(both, static_argnums=4)
    one = [array[:1] for array in (query, key, value, documents)]
    pairs = list(zip(*(jax.tree.leaves(run(*one, kind)) for kind in ("blocked", "full")), strict=True))
    worst = max(
        float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b.astype(jnp.float32))) for a, b in pairs
    )
    by_cudnn = runs_cudnn(query, 512, query.shape[-1])
    yield f"- blocked, by cuDNN: {by_cudnn}; largest relative difference from plain attention {worst:.1e}"
    arguments = (query, key, value, documents)
    seconds = statistics.median(
        timing.in_turns({"both": lambda: run(*arguments, "blocked")}, _CALLS.value)["both"].clock
    )
    flops = 7 * 2 * sizes.rows * sizes.heads * sizes.head_dim * sizes.tokens**2 / 2
    yield f"- {sizes.rows} x {sizes.tokens} tokens, forward and backward: {1e3 * seconds:.2f} ms"
    yield f"- {flops / seconds / 1e12:.0f} TFLOP/s, counting the causal half"


def train_step(sizes: Sizes) -> Iterator[str]:
    """Train step of a 4-layer Mixtral-style model, then a profile of three steps."""
    import jax
    import numpy as np

    from moe.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, TrainConfig
    from moe.models import flops
    from moe.parallel.mesh import make_mesh
    from moe.training.batches import place
    from moe.training.profiling import measured_matmul_rate
    from moe.training.step import build

    heads: Any = {"num_heads": sizes.model_dim // 16, "num_kv_heads": sizes.model_dim // 16, "head_dim": 16}
    if sizes is not TINY:
        heads = {"num_heads": sizes.model_dim // 128, "num_kv_heads": 4, "head_dim": 128}
    dtype: Any = sizes.dtype
    model = ModelConfig(
        vocab_size=sizes.vocab_size, d_model=sizes.model_dim, num_layers=4, d_ff=sizes.model_ff, dtype=dtype,
        attention="blocked", moe=MoEConfig(num_experts=sizes.experts, dispatch="dropless"), **heads,
    )  # fmt: skip
    config = Config(
            model=model, data=DataConfig(sequence_length=sizes.tokens), train=TrainConfig(batch_size=sizes.rows),
            mesh=MeshConfig(data=1),
        )  # fmt: skip
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        tokens = np.random.default_rng(0).integers(3, model.vocab_size, (sizes.rows, sizes.tokens)).astype(np.int32)
        positions = np.broadcast_to(np.arange(sizes.tokens, dtype=np.int32), tokens.shape)
        batch = {"tokens": tokens, "targets": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}
        state, placed, times = program.init(), place(batch, mesh), []
        metrics: Any = None
        for _ in range(_CALLS.value + 2):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(program.train_step(state, placed))
            times.append(time.perf_counter() - start)
        median = statistics.median(times[2:])
        rate = measured_matmul_rate(sizes.dtype, size=sizes.side)
        total, active = flops.count_parameters(config.model)
        mfu = tokens.size * flops.train_flops_per_token(config.model, sizes.tokens) / median / rate
        yield f"- {total:,} parameters, {active:,} active; {sizes.rows} x {sizes.tokens} tokens, {sizes.dtype}"
        yield f"- {1e3 * median:.1f} ms a step (minimum {1e3 * min(times[2:]):.1f}), {mfu:.2f} of the matmul rate"
        yield f"- loss after {len(times)} steps on one batch: {float(metrics.loss):.3f}"
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(3):
                    state, metrics = jax.block_until_ready(program.train_step(state, placed))
            yield ""
            yield from _profile(next(Path(folder).rglob("*.xplane.pb")))


def _profile(path: Path) -> Iterator[str]:
    """The kernels of a trace that take most time, over all its steps."""
    import jax

    sums: dict[str, float] = {}
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if "/device:GPU" not in plane.name:
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    name = re.sub(r"[._]\d+$", "", event.name)
                    sums[name] = sums.get(name, 0.0) + event.duration_ns
    total = sum(sums.values())
    if not total:
        yield "The trace holds no kernels of a GPU."
        return
    yield "| kernel | share of the kernels' time |"
    yield "|---|---|"
    for name, time_of in sorted(sums.items(), key=lambda item: -item[1])[:15]:
        yield f"| `{name[:80]}` | {100 * time_of / total:.1f} % |"


def grouped_matmuls(sizes: Sizes) -> Iterator[str]:
    """Kernels of grouped matmuls."""
    from moe.lab.benchmarks import gpu_kernels

    yield from gpu_kernels.grouped_matmuls(sizes, _CALLS.value)


def large_groups(sizes: Sizes) -> Iterator[str]:
    """Groups that are computed in row blocks."""
    from moe.lab.benchmarks import gpu_kernels

    yield from gpu_kernels.large_groups(sizes, _CALLS.value)


SECTIONS: dict[str, Callable[[Sizes], Iterator[str]]] = {
    "Device": device,
    "Parity with the oracle": parity,
    "Mixtral's layer": layer,
    "Grouped matmuls": grouped_matmuls,
    "Large groups": large_groups,
    "Grouped matmul beside PyTorch's": pytorch,
    "Attention": attention,
    "Train step and profile": train_step,
}


def _case(sizes: Sizes, mode: str) -> Any:
    from moe.lab.benchmarks.layer_programs import Case

    return Case(
        shape="Mixtral", gate="mixtral", mode=mode, experts=sizes.experts, k=2, d_model=sizes.d_model,
        d_ff=sizes.d_ff, activation="swiglu", tokens=sizes.tokens, group_size=0, capacity_factor=-1.0,
        dtype=sizes.dtype, skew=1.0,
    )  # fmt: skip


def _peak() -> float | None:
    from moe.parallel import target

    return target.current().peak_flops


def report(sizes: Sizes, say: Callable[[str], None]) -> tuple[list[str], list[str]]:
    """All sections, (lines, names of those that failed); a section that fails says why and does not end the report."""
    lines, failed = [], []
    for title, section in SECTIONS.items():
        start = time.perf_counter()
        lines += ["", f"## {title}", ""]
        try:
            for line in section(sizes):
                lines.append(line)
        except Exception as error:  # a report of what works and what does not
            failed.append(title)
            lines += ["", f"**Failed**: {type(error).__name__}: {' '.join(str(error).split())[:300]}"]
        say(f"{title}: {time.perf_counter() - start:.0f} s{', FAILED' if title in failed else ''}")
    return lines, failed


def main() -> None:
    """Write the page, or print it without numbers under --dry."""
    import jax

    from moe.config import ConfigError
    from moe.system.atomic_files import write_atomic

    found = jax.devices()[0]
    if found.platform != "gpu" and not _DRY.value:
        raise ConfigError(
            f"gpu_report: needs a GPU, and JAX has {found.device_kind}; --dry tests the script without one"
        )
    lines, failed = report(TINY if _DRY.value else Sizes(), lambda text: print(text, file=sys.stderr, flush=True))
    if _DRY.value:
        # Digits are struck out: nothing on this page was measured on a GPU.
        print("# DRY RUN of gpu_report: no result\n" + re.sub(r"\d", "x", "\n".join(lines)))
    else:
        name = re.sub(r"[^a-z0-9]+", "-", (_NAME.value or found.device_kind).lower()).strip("-")
        FOLDER.mkdir(parents=True, exist_ok=True)
        head = (
            f"# {found.device_kind}\n\nWritten by `python scripts/gpu_report.py` on {time.strftime('%Y-%m-%d')}; "
            f"one GPU, medians of {_CALLS.value} calls."
        )
        write_atomic(FOLDER / f"{name}.md", "\n".join([head, *lines, ""]))
        print(f"wrote {FOLDER / name}.md")
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)}")


if __name__ == "__main__":
    cli.run(
        main,
        examples=(
            "python scripts/gpu_report.py",
            "python scripts/gpu_report.py --dry --calls=1",
        ),
    )
