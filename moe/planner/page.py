"""The text page of a plan."""

from __future__ import annotations

from moe.planner import counts
from moe.planner.chips import GiB
from moe.planner.compiled import MEMORY_KINDS
from moe.planner.exchanges import ROUTED
from moe.planner.plan import Plan


def render(plan: Plan) -> str:
    """Memory, exchanges, FLOPs and predicted time, each marked as a fact or an estimate."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_exchanges(plan), "", *_flops(plan), "", *_time(plan)])


def _device(plan: Plan) -> str:
    if plan.platform == "gpu":
        return "GPU"
    return "chip" if plan.devices == plan.chips else "core"


def _head(plan: Plan) -> list[str]:
    unit = "GPUs" if plan.platform == "gpu" else "chips"
    chips = f"{plan.chips} {unit}" + (f" = {plan.devices} cores" if plan.devices != plan.chips else "")
    slices = f"{plan.num_slices} slices of " if plan.num_slices > 1 else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    return [
        f"{slices}{plan.topology}: {chips}; mesh {mesh}; remat {plan.remat}; compiled in {plan.compile_seconds:.1f} s",
        f"model: {plan.total_parameters:,} parameters, {plan.active_parameters:,} active; "
        f"{plan.tokens:,} tokens per step",
    ]


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    return [
        f"Memory per {_device(plan)} (fact): fits, {memory.total / GiB:.2f} GiB of {memory.capacity / GiB:.0f}",
        *(f"  {each}" for each in memory.notes(plan.platform)),
        *(f"  {name:12} {getattr(memory, name) / GiB:8.2f} GiB" for name in MEMORY_KINDS),
        *(
            [f"  alive at the peak {memory.peak / GiB:.2f} GiB; the rest is gaps between buffers"]
            if 0 < memory.peak < memory.total
            else []
        ),
        *([f"  in the host's memory {memory.host / GiB:.2f} GiB"] if memory.host else []),
    ]


def _exchanges(plan: Plan) -> list[str]:
    lines = [
        f"Exchanges (collectives) of a step, bytes per {_device(plan)} (fact; times: network model, an estimate)",
        f"  {'kind':20} {'axes':16} {'purpose':24} {'count':>6} {'async':>6} {'MiB':>10} {'ms':>9} {'exposed':>9}",
    ]
    for exchange in plan.exchanges:
        if exchange.bytes >= 2**20:
            figures = (
                f"{exchange.count:6} {exchange.asynchronous:6} {exchange.bytes / 2**20:10,.0f} "
                f"{1e3 * exchange.seconds:9.2f} {1e3 * exchange.exposed_seconds:9.2f}"
            )
            lines.append(f"  {exchange.kind:20} {'+'.join(exchange.axes):16} {exchange.purpose:24} {figures}")
    small = [exchange for exchange in plan.exchanges if exchange.bytes < 2**20]
    if small:
        lines.append(f"  {sum(e.count for e in small)} more, in groups of less than 1 MiB")
    if plan.token_exchanges:
        names = ", ".join(exchange.purpose for exchange in plan.token_exchanges)
        lines.append(f"  PROBLEM: arrays other than weights are gathered on every {_device(plan)}: {names}")
        lines.append("  another mesh or model.moe.dispatch may avoid this: --search compiles and ranks them")
    elif plan.unnamed_gathers:
        lines.append("  the program does not name its exchanges; plan one slice to see whether tokens are gathered")
    elif any(exchange.kind == "all-gather" and exchange.purpose == ROUTED for exchange in plan.exchanges):
        lines.append("  tokens are gathered as model.moe.exchange=all_gather asks, and by nothing else")
    else:
        lines.append("  no all-gather of tokens")
    return lines


def _limits(plan: Plan) -> str:
    """Seconds at each of the step's limits."""
    return ", ".join(f"{name} {seconds:.3g} s" for name, seconds in plan.limits.items())


def _flops(plan: Plan) -> list[str]:
    ratio = plan.program_flops / plan.model_flops
    return [
        "FLOPs of a step, all chips (counted)",
        f"  6 x active parameters x tokens        {plan.simple_flops:.4g}",
        f"  model, with attention (for MFU)       {plan.model_flops:.4g}",
        f"  matrix products traced                {plan.program_flops:.4g} = {ratio:.2f} x the model's: "
        "recomputation, empty expert slots, masked attention",
    ]


def _time(plan: Plan) -> list[str]:
    unit = "GPU" if plan.platform == "gpu" else "chip"
    low, high = plan.step_interval
    rate, mfu = plan.tokens_per_second_per_chip, 100 * plan.mfu
    slower, faster = plan.step_seconds / high, plan.step_seconds / low
    lines = [
        "Time of a step (estimate)" + (f", what if: {plan.scenario}" if plan.scenario else ""),
        f"  on the {_device(plan):7}{1e3 * plan.compute_seconds:9.1f} ms  "
        f"{plan.estimate}; {plan.unpriced} instructions at memory bandwidth; kernels "
        f"{1e3 * plan.kernel_seconds:.1f} ms ({1e3 * plan.kernel_low:.0f} to {1e3 * plan.kernel_high:.0f})",
        *(f"    {row['part']:22} {1e3 * row['seconds']:9.1f} ms  {row['kind']}" for row in plan.where[:12]),
        f"  exposed       {1e3 * plan.exposed_seconds:9.1f} ms  exchange with no work scheduled beside it",
        f"  at least      {1e3 * plan.floor_seconds:9.1f} ms  its FLOPs at peak, and that exchange at full bandwidth",
        f"  of its floor  {counts.share_words(plan.limits, plan.step_seconds)}: {_limits(plan)}",
        f"  step {plan.step_seconds:.3g} s ({low:.3g} to {high:.3g}), MFU {mfu:.1f} % ({mfu * slower:.1f} to "
        f"{mfu * faster:.1f}), {rate:,.0f} tokens/s/{unit} ({rate * slower:,.0f} to {rate * faster:,.0f})",
        f"  {plan.cost()}",
        f"  bound by      {plan.bound}",
        f"  80 % interval from {plan.interval_basis}",
        "  left out: stragglers, the host's work between steps, checkpoints, restarts",
    ]
    if plan.bubble:
        stages, idle = plan.mesh["pipeline"], plan.mesh["pipeline"] - 1
        turns = f"of the {stages} stages has no microbatch in {idle} of its {round(idle / plan.bubble)} turns"
        lines.append(f"  bubble        {100 * plan.bubble:9.1f} %   counted above: each {turns}")
    if plan.unknown_loops:
        lines.append(f"  {plan.unknown_loops} loops with an unreadable trip count are counted once: an underestimate")
    return lines
