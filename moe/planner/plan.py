"""Facts and estimates of a run that was not started.

Memory, exchanges and compile time are facts of the compiled program. FLOPs are counted in the traced program. Times are
estimates: the compiler's own, plus the network model of :mod:`moe.planner.network`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moe.planner import calibration, counts, excess, exchanges
from moe.planner.compiled import Memory
from moe.planner.exchanges import Exchange
from moe.planner.kinds import kind_of
from moe.planner.records import Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan, by :func:`moe.planner.make_plan.make_plan`.

    Attributes:
        platform: "tpu" or "gpu".
        estimate: source of the compiler's estimate of time.
        compile_seconds: of tracing, lowering and compiling on this machine.
        tokens: a step.
        model_flops: of a step by the convention of :mod:`moe.models.flops`.
        simple_flops: 6 x active parameters x tokens.
        program_flops: of all matrix products in a step's program, all devices.
        compute_seconds: the compiler's estimate, unpriced instructions at memory bandwidth, and kernel_seconds.
        kernel_seconds: kernels without an estimate: grouped matmuls for a balanced router by
            :mod:`moe.planner.kernels`, attention by :mod:`moe.planner.attention`.
        kernel_low, kernel_high: kernel_seconds at the ends of the kernels' intervals, all errors fully correlated.
        floor_seconds: a bound of the step from below: the FLOPs that the program executes at peak, and the exchange
            that the devices wait for at the whole of the links' bandwidth.
        limits: seconds that the step needs at least, by what limits it (:func:`moe.planner.counts.limits`).
        counts: from which later prices make its time (:class:`moe.planner.counts.Counts`).
        log_width: of the step's interval, in the logarithm (:func:`moe.planner.calibration.width`).
        steps: published steps that it rests on; chip_steps: those of this chip.
        remat: policy of ``model.remat``.
        parts: the compiler's estimate by pass and kind (:class:`moe.planner.records.CompiledProgram`).
        unpriced: instructions of a step without an estimate; unknown_loops: loops taken as one trip.
        scenario: assumptions that were changed; "" for none.
        basis: seconds of a step by what they rest on.
        where: seconds by part of the model and kind (:func:`moe.planner.timeline.by_part`).
        items: the dearest instructions (:func:`moe.planner.timeline.dearest`).
        lanes: the schedule of the largest computations (:func:`moe.planner.timeline.lanes`).
        arrays: the largest that are alive when most memory is in use, an estimate.
        versions: of JAX and the compilers.
        commit: of the source that was compiled.
        prices: hash of the tables and models by which the program was counted; program: hash of its text.
        config: of the run.
    """

    topology: str
    platform: str
    estimate: str
    num_slices: int
    chips: int
    devices: int
    mesh: dict[str, int]
    remat: str
    memory: Memory
    exchanges: tuple[Exchange, ...]
    compile_seconds: float
    tokens: int
    total_parameters: int
    active_parameters: int
    model_flops: float
    simple_flops: float
    program_flops: float
    peak_flops: float
    compute_seconds: float
    kernel_seconds: float
    kernel_low: float
    kernel_high: float
    floor_seconds: float
    limits: dict[str, float]
    counts: dict[str, Any]
    log_width: float
    steps: int
    chip_steps: int
    parts: dict[str, float]
    unpriced: int
    unknown_loops: int
    scenario: str
    basis: dict[str, float]
    where: tuple[dict[str, Any], ...]
    items: tuple[dict[str, Any], ...]
    lanes: tuple[dict[str, Any], ...]
    arrays: tuple[Array, ...]
    versions: tuple[str, ...]
    commit: str
    prices: str
    program: str
    config: dict[str, Any]

    @property
    def exposed_seconds(self) -> float:
        """Exchange that the devices wait for."""
        return sum(exchange.exposed_seconds for exchange in self.exchanges)

    @property
    def counted_seconds(self) -> float:
        """Work and exposed exchange, as counted."""
        return self.compute_seconds + self.exposed_seconds

    @property
    def step_seconds(self) -> float:
        """Predicted time of a step: what is counted."""
        return self.counted_seconds

    @property
    def step_interval(self) -> tuple[float, float]:
        """80 % interval of the time of a step, seconds."""
        return calibration.interval(self.counted_seconds, self.floor_seconds, self.log_width)

    @property
    def bubble(self) -> float:
        """Share of its turns in which a stage of the pipeline has no microbatch (:mod:`moe.models.pipeline`)."""
        idle, train = self.mesh.get("pipeline", 1) - 1, self.config["train"]
        return idle / (train["accumulation_steps"] * train.get("pipeline_rounds", 1) + idle)

    @property
    def mfu(self) -> float:
        """Model FLOPs over the peak FLOPs of all chips in the predicted time."""
        return self.model_flops / (self.step_seconds * self.peak_flops)

    @property
    def tokens_per_second_per_chip(self) -> float:
        """Predicted rate."""
        return self.tokens / self.step_seconds / self.chips

    @property
    def token_exchanges(self) -> tuple[Exchange, ...]:
        """Unintended all-gathers of more than 1 MiB, a flaw of the sharding. Intended are those of weights, expert
        loads, keys and values, and of tokens with ``exchange=all_gather``.

        Gathers without a name in programs of several slices are in :attr:`unnamed_gathers` instead.
        """
        return tuple(
            exchange
            for exchange in self.exchanges
            if exchange.kind == "all-gather"
            and exchange.purpose not in (exchanges.WEIGHTS, exchanges.LOADS, exchanges.ROUTED)
            and exchange.axes != ("context",)  # keys and values of split rows
            and exchange.bytes > 2**20
            and exchange not in self.unnamed_gathers
        )

    @property
    def unnamed_gathers(self) -> tuple[Exchange, ...]:
        """All-gathers whose purpose is unknown because a program of several slices carries no names."""
        return tuple(
            exchange
            for exchange in self.exchanges
            if exchange.kind == "all-gather" and exchange.purpose == exchanges.UNNAMED and self.num_slices > 1
        )

    def cost(self) -> str:
        """Days and chip-hours of a trillion tokens, as a sentence."""
        return cost_words(self.tokens, self.chips, self.platform, (self.step_seconds, *self.step_interval))

    @property
    def interval_basis(self) -> str:
        """Basis of the interval, as a phrase."""
        shares = {name: seconds / self.compute_seconds for name, seconds in self.basis.items()}
        words = [f"{name} for {100 * share:.0f} % of the work" for name, share in shares.items() if share >= 0.005]
        of_chip = calibration.of_chip(kind_of(self.topology), self.chip_steps)
        steps = f"the spread of {self.steps} published steps, {of_chip}"
        return f"{steps} (docs/results/calibration.md), and {', '.join(words)}"

    @property
    def bound(self) -> str:
        """The largest part of the step, in words."""
        kernel_times = self.kernel_seconds, self.kernel_low, self.kernel_high
        return counts.Priced(*kernel_times, self.compute_seconds, self.exposed_seconds, self.limits["peak"]).bound

    @property
    def reasons(self) -> list[str]:
        """Instructions that keep the step far from its floor (:func:`moe.planner.excess.reasons`)."""
        step = counts.Counts.model_validate(self.counts)
        return excess.reasons(step, kind_of(self.topology), self.step_seconds, self.limits)

    def to_json(self) -> dict[str, Any]:
        """Fields and derived figures."""
        derived = (
            "step_seconds",
            "step_interval",
            "counted_seconds",
            "exposed_seconds",
            "bubble",
            "mfu",
            "bound",
            "reasons",
            "tokens_per_second_per_chip",
        )
        return (
            dataclasses.asdict(self)
            | {name: getattr(self, name) for name in derived}
            | {"memory_total": self.memory.total, "memory_notes": self.memory.notes(self.platform)}
            | {"cost": self.cost(), "interval_basis": self.interval_basis}
            | {"token_all_gathers": len(self.token_exchanges), "unnamed_all_gathers": len(self.unnamed_gathers)}
            | {"gathered_tokens": [exchange.purpose for exchange in self.token_exchanges]}
        )


def cost_words(tokens: float, chips: int, platform: str, seconds: tuple[float, float, float]) -> str:
    """Days and chip-hours of a trillion tokens, as a sentence.

    Args:
        tokens: of a step.
        chips: of the slice; platform: "tpu" or "gpu".
        seconds: of a step, and the ends of its interval.
    """
    days, low, high = (1e12 / tokens * each / 86400 for each in seconds)
    hours = f"{days * 24 * chips:,.0f} {'GPU' if platform == 'gpu' else 'chip'}-hours"
    return f"1 trillion tokens: {days:,.1f} days ({low:,.1f} to {high:,.1f}), {hours}"
