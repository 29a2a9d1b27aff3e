"""A step priced by the shapes of a model alone, without compiling: for any published ``config.json``.

Weights are split over all devices (fsdp), gathered and their gradients scattered in every pass; every device has whole
rows and all experts; layers are recomputed, or not. The same prices as those of compiled programs, for balanced rows:
grouped matmuls (:mod:`moe.planner.kernels`), attention, the movement of rows, the loss and the network. Dense matmuls
reach :data:`_DENSE` of the peak. All that is no matmul, kernel or exchange takes as long as reading or writing
:data:`_PASSES` arrays of each layer, the median of the kept plans. Exchange hides beside :data:`_HIDDEN` of the work.

Against the compiled plans that are kept, counted by the same prices, the logarithm of the ratio has a spread of about
:data:`_FURTHER`, which widens the interval.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from moe.planner import attention, calibration, kernels, network, row_movement, unembedding
from moe.planner.chips import Chip
from moe.planner.gpus import Gpu
from moe.planner.kinds import kind_of
from moe.planner.open_shapes import MIXERS, Sizes
from moe.planner.records import Collective, GroupedMatmul
from moe.planner.topology import Topology
from moe.system.documents import Heading, Paragraph, Table, text

#: Share of the peak of dense matmuls, as the compilers state it for wide ones: TPUs; GPUs have one of their own.
_DENSE = 0.95

#: Arrays [tokens, D] in bfloat16 whose time at memory bandwidth a layer takes beside its matmuls, kernels and row
#: movement, forward and backward together; one without experts has a third of it (assumed).
_PASSES = 360

#: Share of the work beside which exchange is hidden.
_HIDDEN = 0.8

#: Bytes of a parameter that the update reads and writes: float32 weights, gradients and two moments.
_UPDATE = 28

#: Further width of the interval, in the logarithm.
_FURTHER = 0.3


@dataclasses.dataclass(frozen=True)
class ShapePlan:
    """A step that was priced by shapes.

    Attributes:
        parts: seconds by part of the model.
        exposed: seconds of exchange that the devices wait for.
        floor: its FLOPs at peak, seconds.
        state: bytes of parameters and optimizer on a device, in float32.
        approximate: sentences about what is approximate.
    """

    topology: str
    platform: str
    chips: int
    tokens: int
    total_parameters: int
    active_parameters: int
    model_flops: float
    peak_flops: float
    parts: dict[str, float]
    exposed: float
    floor: float
    log_width: float
    chip_steps: int
    state: float
    capacity: float
    approximate: tuple[str, ...]
    prices: str

    @property
    def step_seconds(self) -> float:
        """Predicted time of a step."""
        return sum(self.parts.values()) + self.exposed

    @property
    def step_interval(self) -> tuple[float, float]:
        """80 % interval of it."""
        return calibration.interval(self.step_seconds, self.floor, self.log_width)

    @property
    def mfu(self) -> float:
        """Model FLOPs over the peak FLOPs of all chips in the predicted time."""
        return self.model_flops / (self.step_seconds * self.peak_flops)

    def _compared(self) -> str:
        return calibration.of_chip(kind_of(self.topology), self.chip_steps)

    def to_json(self) -> dict[str, Any]:
        """Fields and derived figures."""
        derived = {name: getattr(self, name) for name in ("step_seconds", "step_interval", "mfu")}
        return dataclasses.asdict(self) | derived

    def render(self) -> str:
        """The plan as text."""
        low, high = self.step_interval
        rate = self.tokens / self.chips
        slower, faster = (100 * self.mfu * self.step_seconds / each for each in (high, low))
        chips = f"{self.chips} {'GPUs' if self.platform == 'gpu' else 'chips'}"
        parts = {name: seconds for name, seconds in self.parts.items() if seconds}
        times = [(name, f"{1e3 * seconds:.1f} ms", "") for name, seconds in parts.items()]
        times.append(("exposed exchange", f"{1e3 * self.exposed:.1f} ms", ""))
        times.append(("at least", f"{1e3 * self.floor:.1f} ms", "its FLOPs at peak"))
        return text(
            [
                Heading(f"{self.topology}: {chips}; by shapes, not compiled"),
                Paragraph(
                    f"{self.total_parameters / 1e9:,.1f}B parameters, {self.active_parameters / 1e9:,.1f}B active; "
                    f"{self.tokens:,} tokens per step"
                ),
                Paragraph(
                    f"parameters and optimizer per device: {self.state / 2**30:.1f} GiB of "
                    f"{self.capacity / 2**30:.0f}; activations are not counted"
                ),
                Heading("Time of a step (estimate)"),
                Table(times, right=(1,)),
                Paragraph(
                    f"step {self.step_seconds:.3g} s ({low:.3g} to {high:.3g}), MFU {100 * self.mfu:.1f} % "
                    f"({slower:.1f} to {faster:.1f}), {rate / self.step_seconds:,.0f} tokens/s per chip "
                    f"({rate / high:,.0f} to {rate / low:,.0f})"
                ),
                Paragraph(
                    f"80 % interval from the spread of published steps, {self._compared()}, and that of prices by "
                    "shapes around compiled programs"
                ),
                Heading("Approximate"),
                *(Paragraph(each) for each in self.approximate),
            ]
        )


def make(sizes: Sizes, topology: Topology, rows: int, tokens: int, *, remat: bool = True) -> ShapePlan:
    """Price a step.

    Args:
        sizes: of the model.
        topology: of the slice.
        rows: of the batch, on each device.
        tokens: of a row.
        remat: recompute the layers in the backward pass.
    """
    return _Pricing(sizes, topology, rows * tokens, tokens, 1 if remat else 0).plan()


@dataclasses.dataclass
class _Pricing:
    """Attributes: sizes of the model; topology; tokens of a device; tokens of a row; passes that are recomputed."""

    sizes: Sizes
    topology: Topology
    here: int
    length: int
    again: int
    low: float = 0.0
    high: float = 0.0
    least: float = 0.0
    uncertain: float = 0.0
    parts: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def chip(self) -> Chip | Gpu:
        return self.topology.chip

    def plan(self) -> ShapePlan:
        """The priced step."""
        sizes, devices = self.sizes, len(self.topology.devices)
        self._dense()
        self._experts()
        self._mixers()
        logits = 2.0 * self.here * sizes.width * sizes.vocabulary * 3
        self._add("loss and unembedding", logits / self.chip.device_peak / unembedding.share(self.chip.name), logits)
        work = sum(self.parts.values())
        layers = sizes.sparse_layers + (len(sizes.layers) - sizes.sparse_layers) / 3
        self._add("the rest of layers", _PASSES * layers * self.here * sizes.width * 2 / self.chip.device_bandwidth)
        self._add("optimizer", _UPDATE * sizes.parameters / devices / self.chip.device_bandwidth)
        exchange = self._exchange()
        tokens = self.here * devices
        known = calibration.rows()
        counted = sum(self.parts.values())
        kernel_width = calibration.kernel_width(counted, self.uncertain, self.low, self.high)
        return ShapePlan(
            topology=self.topology.name,
            platform=self.topology.platform,
            chips=self.topology.num_chips,
            tokens=tokens,
            total_parameters=sizes.parameters,
            active_parameters=sizes.active_parameters,
            model_flops=tokens * (6.0 * sizes.active_parameters + 3 * self._mixer_flops(self.length)),
            peak_flops=self.chip.peak * self.topology.num_chips,
            parts=self.parts,
            exposed=max(exchange - _HIDDEN * work, 0.0),
            floor=self.least,
            log_width=math.hypot(calibration.width(self.chip.name, kernel_width, known), _FURTHER),
            chip_steps=calibration.steps_of(self.chip.name, known),
            state=12.0 * sizes.parameters / devices,
            capacity=self.topology.capacity,
            approximate=(
                "norms, activations and routing by a count of arrays; exchange beside a fixed share of the work",
                "every device has whole rows and all experts: no tokens are exchanged, no stage of a pipeline waits",
                "every FFN is priced as gated; convolutions, indexers, vision and audio are left out",
                *sizes.approximate(),
            ),
            prices=calibration.prices(),
        )

    def _add(self, part: str, seconds: float, flops: float = 0.0) -> None:
        self.parts[part] = self.parts.get(part, 0.0) + seconds
        self.least += flops / self.chip.device_peak

    def _dense(self) -> None:
        flops = 2.0 * self.here * sum(k * n for k, n in self.sizes.matrices) * (3 + self.again)
        share = self.chip.matmul_share if isinstance(self.chip, Gpu) else _DENSE
        self._add("dense matmuls", flops / self.chip.device_peak / share, flops)

    def _experts(self) -> None:
        sizes, name = self.sizes, self.chip.name
        if not sizes.sparse_layers:
            return
        kernel = "tpu" if isinstance(self.chip, Chip) else "triton" if name == "a100" else "mosaic"
        rows = self.here * sizes.chosen
        for k, n in ((sizes.width, 2 * sizes.expert_ffn), (sizes.expert_ffn, sizes.width)):
            forward = GroupedMatmul("rows", (rows, k, n, sizes.experts), (0, 0, 0), 2, 1, kernel)
            back = dataclasses.replace(forward, sizes=(rows, n, k, sizes.experts))
            by_triton = name in ("h100", "h200") and kernel == "mosaic"  # whose weight gradients are Triton's
            weights = dataclasses.replace(forward, kind="weights", kernel="triton" if by_triton else kernel)
            for matmul, runs in ((forward, 1 + self.again), (back, 1), (weights, 1)):
                made = kernels.price(matmul, rows, self.chip)
                count = runs * sizes.sparse_layers
                self._add("experts", made.seconds * count, made.flops * count)
                self._uncertain(made.seconds * count, made.low * count, made.high * count)
        moved = row_movement.price(self.chip.name)
        # To the experts and back, forward and backward; the way there again with recomputation.
        at_bandwidth = (4 + self.again) * sizes.sparse_layers * 4.0 * rows * sizes.width / self.chip.device_bandwidth
        self._add("row movement", moved.seconds * at_bandwidth)
        self._uncertain(*(each * at_bandwidth for each in (moved.seconds, moved.low, moved.high)))

    def _mixers(self) -> None:
        for name in dict.fromkeys(mixer for mixer, _ in self.sizes.layers):
            layers = sum(mixer == name for mixer, _ in self.sizes.layers)
            mixer = MIXERS[name]
            heads, dims = mixer.heads(self.sizes)
            keys = mixer.keys(self.sizes, self.length)
            for where, runs, matmuls in (("forward", 1 + self.again, 2), ("backward", 1, 5)):
                flops = matmuls * self.here * heads * keys * dims * layers * runs
                if not flops:
                    continue
                times, low, high = attention.times(self.chip.name, where, self.length, keys, dims)
                at_peak = flops / self.chip.device_peak
                self._add("attention", times * at_peak, flops)
                self._uncertain(times * at_peak, low * at_peak, high * at_peak)

    def _mixer_flops(self, length: int) -> float:
        """FLOPs of a token, forward, in all mixers beside their projections."""
        found = 0.0
        for name, _ in self.sizes.layers:
            heads, dims = MIXERS[name].heads(self.sizes)
            found += 2.0 * heads * MIXERS[name].keys(self.sizes, length) * dims
        return found

    def _uncertain(self, seconds: float, low: float, high: float) -> None:
        self.uncertain += seconds
        self.low += low
        self.high += high

    def _exchange(self) -> float:
        """Seconds of the exchange of weights, bfloat16, and of their gradients, float32."""
        devices = list(self.topology.devices)
        everywhere = tuple(range(len(devices)))
        gather = Collective("all-gather", ("fsdp",), everywhere, 2 * self.sizes.parameters, 1, -1, "")
        scatter = dataclasses.replace(gather, kind="reduce-scatter", bytes=4 * self.sizes.parameters)
        gathers = 2 + self.again
        return gathers * network.seconds(gather, devices, self.chip) + network.seconds(scatter, devices, self.chip)
