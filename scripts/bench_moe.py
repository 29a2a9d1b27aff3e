"""Times MoE layers against matmuls: `python scripts/bench_moe.py [--shapes=A,B] [--modes=gather,dropless]`.

The reference is the layer's active FLOPs as bare batched matmuls, timed in turns with the layer in one process. A share
of it is the median of the ratios within each turn. Next to it are the ratio of the minima and, on CPU, the share by
processor time, which excludes other processes. On accelerators the reference is the larger of FLOPs over the rate of
one large matmul and weight bytes over the bandwidth of a copy, both measured. The column "of matmul" is the rate of
active FLOPs over that of one large matmul of the same dtype. `--model` times a 4-layer model's train step instead.

`--topology=v5p:2x2x2` runs nothing: it compiles the layer for absent TPUs, or GPUs as `h100:1x8`, with --tokens on
each of them, and prints the compiler's estimates (see moe/planner/layer.py and docs/pods.md).
"""

import sys
from pathlib import Path

from moe.system import process

if __name__ == "__main__":
    process.prepare()
    if any(word.lstrip("-").partition("=")[0] == "topology" for word in sys.argv[1:]):
        process.use_tpu_compiler()  # before JAX

import dataclasses
import json
import statistics
from collections.abc import Callable
from typing import Any, cast

from absl import flags

from moe.programs import cli

_SHAPES = flags.DEFINE_list("shapes", ["A", "B", "sweep"], "A, B, or sweep: A with 8, 16, 32, 64 and 128 experts.")
_GATES = flags.DEFINE_list("gates", [], "Names of gates, or all; empty: the shape's own.")
_MODES = flags.DEFINE_list("modes", ["gather", "dropless", "einsum"], "Dispatch modes.")
_TOKENS = flags.DEFINE_integer("tokens", 4096, "Tokens a layer sees.", lower_bound=1)
_GROUP = flags.DEFINE_integer(
    "group_size", 0, "Tokens that share a capacity; 0: all tokens of a device, or 512 for einsum.", lower_bound=0
)
_EXPERTS = flags.DEFINE_list("experts", [], "Numbers of experts, instead of the shape's.")
_D_MODEL = flags.DEFINE_integer("d_model", 512, "D.", lower_bound=1)
_D_FF = flags.DEFINE_integer("d_ff", 0, "F; 0: the shape's.", lower_bound=0)
_CAPACITY = flags.DEFINE_float("capacity_factor", -1.0, "Capacity factor of gather and einsum; -1: the gate's own.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the matmuls.")
_SKEW = flags.DEFINE_float("skew", 1.0, "Odds of the first expert over any other at each draw; 1: the gate decides.")
_MESH = flags.DEFINE_list("mesh", [], "Sizes of mesh axes, as in expert=4,data=2; empty: one device.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed calls of each program.", lower_bound=1)
_JSON = flags.DEFINE_string("json", "", "File to write all numbers to.")
_ALONE = flags.DEFINE_bool(
    "experts_alone", False, "Also time the experts by themselves: equal loads, no router or dispatch."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "Compile for absent TPUs (v5p:2x2x2) or GPUs (h100:1x8), and run nothing."
)
_MODEL = flags.DEFINE_bool("model", False, "Time the train step of a 4-layer Mixtral-style model of 100.7M parameters.")

#: Tokens of a row with --model.
MODEL_LENGTH = 512


def check() -> None:
    """Refuse names and numbers that the flag types accept."""
    from moe.config import ConfigError
    from moe.config.registry import LAYERS
    from moe.dispatch.modes import CONFIG_MODES
    from moe.parallel.mesh import parse_sizes
    from moe.system.fields import whole_number

    parse_sizes(_MESH.value)
    allowed: dict[str, list[str]] = {
        "shapes": ["A", "B", "sweep"],
        "gates": ["all", *LAYERS],
        "modes": list(CONFIG_MODES),
    }
    for name, choices in allowed.items():
        for entry in flags.FLAGS[name].value or []:
            if entry not in choices:
                raise ConfigError(f"--{name}={entry}: must be of {', '.join(choices)}")
    for other in ("topology", "model", "mesh"):
        if _ALONE.value and flags.FLAGS[other].value:
            raise ConfigError(f"--experts_alone: is timed on one device, without --{other}")
    cli.only_with(not _TOPOLOGY.value, "is not read with --topology, which runs nothing", _SKEW, _REPEATS, _MODEL)
    own = "is not read with --model, which has its own"
    cli.only_with(not _MODEL.value, own, _SHAPES, _GATES, _EXPERTS, _GROUP, _CAPACITY, _SKEW)
    if _MODEL.value and _TOKENS.value % MODEL_LENGTH:
        raise ConfigError(f"--tokens={_TOKENS.value}: must be a multiple of {MODEL_LENGTH} with --model, its rows")
    if not _SKEW.value > 0:
        raise ConfigError(f"--skew={_SKEW.value}: must be above 0")
    for number in _EXPERTS.value or []:
        if not whole_number(number):
            raise ConfigError(f"--experts={','.join(_EXPERTS.value)}: {number!r} must be a positive integer")


def _case(shape: str, gate: str, mode: str, experts: int, k: int, d_ff: int, activation: str) -> Any:
    """A case with the flags' sizes."""
    from moe.lab.benchmarks.layer_programs import Case

    return Case(
        shape=shape,
        gate=gate,
        mode=mode,
        experts=experts,
        k=k,
        d_model=_D_MODEL.value,
        d_ff=_D_FF.value or d_ff,
        activation=activation,
        tokens=_TOKENS.value,
        group_size=_GROUP.value,
        capacity_factor=_CAPACITY.value,
        dtype=_DTYPE.value,
        skew=_SKEW.value,
    )


def cases() -> list[Any]:
    """The cases that the flags name."""
    from moe.config.registry import LAYERS, find_gate

    found = []
    for shape in _SHAPES.value:
        own, d_ff, k, activation, experts = {
            "A": ("mixtral", 1792, 2, "swiglu", [8]),
            "B": ("switch", 2048, 1, "relu", [32]),
            "sweep": ("mixtral", 1792, 2, "swiglu", [8, 16, 32, 64, 128]),
        }[shape]
        gates = sorted(LAYERS) if _GATES.value == ["all"] else _GATES.value or [own]
        for count in map(int, _EXPERTS.value or experts):
            for gate in gates:
                own_gate = find_gate(gate)
                gate_k = k if own_gate.sets_k else own_gate.experts_per_token(count)
                modes = [*_MODES.value, *["experts alone"] * _ALONE.value]
                found += [_case(shape, gate, mode, count, gate_k, d_ff, activation) for mode in modes]
    return found


def bench_layers() -> list[dict[str, Any]]:
    """Time all cases; those of one shape and number of experts in turns with their reference."""
    import jax

    from moe.lab.benchmarks import layer_programs, timing
    from moe.parallel.mesh import AXES, axis_size

    rows = []
    groups: dict[tuple[Any, ...], list[layer_programs.Case]] = {}
    for case in cases():
        groups.setdefault((case.shape, case.experts, case.k, case.d_ff), []).append(case)
    print(
        f"{'case':44} {'pass':8} {'median ms':>9} {'min':>7} {'max':>7} "
        f"{'share':>13} {'by minima':>9} {'by CPU time':>11} {'of matmul':>9} {'dropped':>8}"
    )
    for members in groups.values():
        programs: dict[tuple[layer_programs.Case | None, str], Callable[[], Any]] = {}
        drops: dict[layer_programs.Case, float] = {}
        on_cpu = jax.default_backend() == "cpu"
        if on_cpu:
            programs |= {(None, which): f for which, f in layer_programs.reference(members[0]).items()}
        for case in members:
            if case.mode == "experts alone":
                programs |= {(case, which): f for which, f in layer_programs.experts_alone(case).items()}
                drops[case] = 0.0
                continue
            try:
                made, drops[case] = layer_programs.layer(case)
            except ValueError as refusal:
                print(f"{case.name:44} refused: {refusal}")
                continue
            programs |= {(case, which): f for which, f in made.items()}
        side = 2048 if on_cpu else 8192
        times = timing.in_turns(
            programs | {"large matmul": layer_programs.large_matmul(side, _DTYPE.value)}, _REPEATS.value
        )
        large = statistics.median(times.pop("large matmul").clock)
        devices = axis_size(*AXES)  # each device ran the large matmul and the references in full
        rate = 2 * side**3 / large * devices
        work = layer_programs.active_flops(members[0])
        if on_cpu:
            references = {
                which: [seconds / devices for seconds in times[None, which].clock] for which in ("forward", "both")
            }
        else:
            fixed = layer_programs.accelerator_seconds(members[0], rate)
            references = {which: [value] * _REPEATS.value for which, value in fixed.items()}
        for (case, which), seconds in times.items():
            values = seconds.clock
            median = statistics.median(values)
            name = f"{members[0].shape} E={members[0].experts} reference" if case is None else case.name
            # Ratios within a turn: a machine that is slow for a while is slow for both.
            share = statistics.median(r / own for r, own in zip(references[which], values, strict=True))
            # The steadiest number on a shared host: time taken by other processes is not counted.
            by_processor = None
            if on_cpu:
                ratios = zip(times[None, which].processor, seconds.processor, strict=True)
                by_processor = statistics.median(r / devices / own for r, own in ratios)
            of_minima, of_matmul = min(references[which]) / min(values), work[which] / median / rate
            dropped = 0.0 if case is None else drops[case]
            print(
                f"{name:44} {which:8} {median * 1e3:9.1f} {min(values) * 1e3:7.1f} {max(values) * 1e3:7.1f} "
                f"{share:13.2f} {of_minima:9.2f} {'–' if by_processor is None else f'{by_processor:.2f}':>11} "
                f"{of_matmul:9.2f} {dropped:8.3f}",
                flush=True,
            )
            fields = {} if case is None else dataclasses.asdict(case)
            rows.append(
                fields
                | {
                    "name": name,
                    "pass": which,
                    "seconds": values,
                    "share": share,
                    "share_of_minima": of_minima,
                    "share_of_processor_time": by_processor,
                    "share_of_matmul": of_matmul,
                    "dropped": dropped,
                }
            )
    return rows


def read_layers(sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Compile all cases for the topology, every device with its own tokens."""
    from moe.config import Config, DataConfig, MeshConfig, TrainConfig, validate_mesh
    from moe.lab.benchmarks import layer_programs
    from moe.parallel.mesh import make_mesh
    from moe.planner import layer as pods_layer
    from moe.planner.topology import get_topology

    topology = get_topology(_TOPOLOGY.value)
    mesh = MeshConfig(**sizes) if _MESH.value else MeshConfig(data=1, expert=-1)
    shape = make_mesh(mesh, topology.devices).shape
    rows = shape["data"] * shape["fsdp"] * shape["expert"]
    print(
        f"{topology.name}, mesh {' x '.join(f'{axis} {size}' for axis, size in shape.items())}, {_DTYPE.value}, "
        f"{_TOKENS.value} tokens a device, d {_D_MODEL.value}; compiled, not run"
    )
    print(pods_layer.HEADER)
    found = []
    for case in cases():
        config = Config(
            model=layer_programs.model_config(case),
            mesh=mesh,
            data=DataConfig(sequence_length=_TOKENS.value),
            train=TrainConfig(batch_size=rows),
        )
        validate_mesh(config, shape)
        for which in ("forward", "both"):
            reading = pods_layer.read_layer(config, topology, _TOKENS.value, backward=which == "both")
            print(pods_layer.render(case.name, which, reading), flush=True)
            found.append(dataclasses.asdict(case) | {"name": case.name, "pass": which} | reading.to_json())
    return found


def bench_model() -> list[dict[str, Any]]:
    """Time train steps of the 4-layer model by mode, in turns with its matmuls: those of the experts as batched
    matmuls, all others at the rate of one large matmul."""
    import jax
    import numpy as np

    from moe.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig
    from moe.lab.benchmarks import layer_programs, timing
    from moe.models import flops
    from moe.training import profiling
    from moe.training.batches import place
    from moe.training.step import build

    length, batch_size, layers, f = MODEL_LENGTH, _TOKENS.value // MODEL_LENGTH, 4, _D_FF.value or 1792
    mesh = jax.sharding.get_mesh()
    states, programs, drops = {}, {}, {}
    experts = _case("A", "mixtral", "", 8, 2, f, "swiglu")
    config = None
    for mode in _MODES.value:
        model = ModelConfig(
            d_model=_D_MODEL.value,
            num_layers=layers,
            num_heads=_D_MODEL.value // 64,
            num_kv_heads=_D_MODEL.value // 64,
            head_dim=64,
            d_ff=f,
            dtype=cast(Any, _DTYPE.value),
            vocab_size=8192,
            tie_embeddings=False,
            moe=MoEConfig(num_experts=8, dispatch=cast(Any, mode)),
        )
        config = Config(
            model=model,
            data=DataConfig(sequence_length=length),
            train=TrainConfig(batch_size=batch_size),
        )
        program = build(config, mesh)
        tokens = np.random.default_rng(0).integers(3, model.vocab_size, (batch_size, length)).astype(np.int32)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        batch = {"tokens": tokens, "targets": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}
        states[mode], placed = program.init(), place(batch, mesh)

        def step(mode=mode, program=program, batch=placed):
            states[mode], metrics = program.train_step(states[mode], batch)
            assert metrics.layers is not None
            drops[mode] = metrics.layers.fraction_tokens_dropped
            return metrics

        programs[mode] = step
    assert config is not None
    rates = []
    programs["reference"] = layer_programs.reference(experts)["both"]
    programs["large matmul"] = lambda: rates.append(profiling.measured_matmul_rate(_DTYPE.value, repeats=1))
    seconds = {name: times.clock for name, times in timing.in_turns(programs, _REPEATS.value).items()}
    total, active = flops.count_parameters(config.model)
    expert_flops = 6 * _TOKENS.value * 2 * 3 * _D_MODEL.value * f * layers
    rest = flops.train_flops_per_token(config.model, length) * _TOKENS.value - expert_flops
    at_reference = layers * statistics.median(seconds["reference"]) + rest / statistics.median(rates)
    at_reference /= mesh.size  # each device ran them whole
    print(
        f"{total:,} parameters, {active:,} active; {batch_size} x {length} tokens; "
        f"as matmuls alone {at_reference * 1e3:.0f} ms"
    )
    rows = []
    for mode in _MODES.value:
        median, dropped = statistics.median(seconds[mode]), float(np.mean(drops[mode]))
        print(
            f"{mode:10} train step: median {median * 1e3:.0f} ms, {min(seconds[mode]) * 1e3:.0f} to "
            f"{max(seconds[mode]) * 1e3:.0f}; {median / at_reference:.2f} x its matmuls; "
            f"{100 * dropped:.1f} % of assignments dropped"
        )
        fields = {"seconds": seconds[mode], "reference": at_reference, "dropped": dropped}
        rows.append({"name": f"train step {mode}"} | fields)
    return rows


def main() -> None:
    """Print the table, and write it to --json."""
    import jax

    from moe.config import MeshConfig
    from moe.parallel.mesh import AXES, make_mesh, parse_sizes

    check()
    sizes = dict.fromkeys(AXES, 1) | parse_sizes(_MESH.value)
    if _TOPOLOGY.value:
        _write({"topology": _TOPOLOGY.value}, read_layers(sizes))
        return
    count = 1
    for size in sizes.values():
        count *= size
    device = jax.devices()[0]
    print(
        f"{device.device_kind} x {count}, {_DTYPE.value}, {_TOKENS.value} tokens, d {_D_MODEL.value}; "
        f"{process.allocator()}; median of {_REPEATS.value}"
    )
    with jax.set_mesh(make_mesh(MeshConfig(**sizes), jax.devices()[:count])):
        rows = bench_model() if _MODEL.value else bench_layers()
    _write({"device": device.device_kind, "devices": count, "allocator": process.allocator()}, rows)


def _write(setting: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write all numbers to --json."""
    from moe.system.atomic_files import write_atomic

    if _JSON.value:
        values = {flag: flags.FLAGS[flag].value for flag in ("tokens", "dtype", "skew", "d_model", "group_size")}
        write_atomic(Path(_JSON.value), json.dumps(setting | values | {"rows": rows}, indent=1))


if __name__ == "__main__":
    cli.run(
        main,
        examples=(
            "python scripts/bench_moe.py --shapes=A,B --modes=gather,dropless --repeats=9",
            "python scripts/bench_moe.py --topology=v5p:2x2x2 --shapes=A --dtype=bfloat16",
        ),
    )
