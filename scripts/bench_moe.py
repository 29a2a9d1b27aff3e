"""The MoE layer against its roof: `python scripts/bench_moe.py [--shapes=A,B] [--modes=gather,dropless] [--json=FILE]`.

The roof is the layer's active FLOPs as bare batched matmuls, timed in turns with the layer in one process; a share of
it is the median of the turns' own ratios, and means something on a busy machine too. Beside it stand the ratio of the
minima and, on CPU, the share by the processors' time, which leaves out what others do on the machine. On accelerators
the roof is the larger of FLOPs over the rate of one large matmul and bytes of weights over the bandwidth of a copy,
both measured. The column "of matmul" holds the active FLOPs a second against one large matmul's of the same dtype.
`--model` times a 4-layer model's train step instead.

`--topology=v5p:2x2x2` runs nothing: it compiles the layer for absent TPUs, or GPUs as `h100:1x8`, with --tokens on each
of them, and prints the compiler's estimates (see moe/planner/layer.py and docs/pods.md).
"""

import sys
from pathlib import Path

from moe import platform

if __name__ == "__main__":
    platform.prepare()
    if any(word.lstrip("-").partition("=")[0] == "topology" for word in sys.argv[1:]):
        platform.use_tpu_compiler()  # before JAX

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from moe import cli

_SHAPES = flags.DEFINE_list("shapes", ["A", "B", "sweep"], "A, B, or sweep: A with 8, 16, 32, 64 and 128 experts.")
_GATES = flags.DEFINE_list("gates", [], "Names of gates, or all; empty: the shape's own.")
_MODES = flags.DEFINE_list("modes", ["gather", "dropless", "einsum"], "Dispatch modes.")
_TOKENS = flags.DEFINE_integer("tokens", 4096, "Tokens a layer sees.", lower_bound=1)
_GROUP = flags.DEFINE_integer(
    "group_size", 0, "Tokens that share a capacity; 0: all, but 512 for einsum.", lower_bound=0
)
_EXPERTS = flags.DEFINE_list("experts", [], "Numbers of experts, instead of the shape's.")
_D_MODEL = flags.DEFINE_integer("d_model", 512, "D.", lower_bound=1)
_D_FF = flags.DEFINE_integer("d_ff", 0, "F; 0: the shape's.", lower_bound=0)
_CAPACITY = flags.DEFINE_float("capacity_factor", -1.0, "Of gather and einsum; -1: the gate's own.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the matmuls.")
_SKEW = flags.DEFINE_float("skew", 1.0, "Share of the first expert, in shares of the others; 1: the gate decides.")
_MESH = flags.DEFINE_list("mesh", [], "Sizes of mesh axes, as in expert=4,data=2; empty: one device.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed calls of each program.", lower_bound=1)
_JSON = flags.DEFINE_string("json", "", "File to write all numbers to.")
_ALONE = flags.DEFINE_bool(
    "experts_alone", False, "Also the experts by themselves: equal loads, no router or dispatch."
)
_TOPOLOGY = flags.DEFINE_string("topology", "", "Compile for this TPU topology, such as v5p:2x2x2, and run nothing.")
_MODEL = flags.DEFINE_bool("model", False, "Time the train step of a 4-layer Mixtral-style model of 100.7M parameters.")


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer: what is multiplied, and how the rows get there."""

    shape: str
    gate: str
    mode: str
    experts: int
    k: int
    d_ff: int
    activation: str


def check() -> None:
    """Refuses names and numbers that the flags' own types let pass."""
    from moe.config import ConfigError
    from moe.dispatch.modes import CONFIG_MODES
    from moe.parallel import partition_specs
    from moe.routing.registry import GATES

    allowed: dict[str, list[str]] = {
        "shapes": ["A", "B", "sweep"],
        "gates": ["all", *GATES],
        "modes": list(CONFIG_MODES),
        "mesh": list(partition_specs.AXES),
    }
    for name, choices in allowed.items():
        for entry in flags.FLAGS[name].value or []:
            if entry.partition("=")[0] not in choices:
                raise ConfigError(f"--{name}={entry}: must be of {', '.join(choices)}")
    for other in ("topology", "model", "mesh"):
        if _ALONE.value and flags.FLAGS[other].value:
            raise ConfigError(f"--experts_alone: is timed on one device, without --{other}")
    numbers = {"experts": _EXPERTS.value or [], "mesh": [entry.partition("=")[2] for entry in _MESH.value or []]}
    for name, values in numbers.items():
        for number in values:
            if not (number.isdigit() and int(number) > 0):
                raise ConfigError(
                    f"--{name}={','.join(flags.FLAGS[name].value or [])}: {number!r} must be a positive integer"
                )


def cases() -> list[Case]:
    """What the flags ask for."""
    from moe.routing.registry import GATES

    found = []
    for shape in _SHAPES.value:
        own, d_ff, k, activation, experts = {
            "A": ("mixtral", 1792, 2, "swiglu", [8]),
            "B": ("switch", 2048, 1, "relu", [32]),
            "sweep": ("mixtral", 1792, 2, "swiglu", [8, 16, 32, 64, 128]),
        }[shape]
        gates = sorted(set(GATES) - {"none"}) if _GATES.value == ["all"] else _GATES.value or [own]
        for count in map(int, _EXPERTS.value or experts):
            for gate in gates:
                gate_k = k
                if GATES[gate].fixed_k or gate == "dense_mixture":
                    gate_k = GATES[gate].experts_per_token or count
                modes = [*_MODES.value, *["experts alone"] * _ALONE.value]
                found += [Case(shape, gate, m, count, gate_k, _D_FF.value or d_ff, activation) for m in modes]
    return found


def roof(tokens: int, case: Case, dtype: str) -> dict[str, Callable[[], Any]]:
    """The bare batched matmuls of the active FLOPs, forward, and forward and backward."""
    import jax
    import jax.numpy as jnp

    e, d, f, rows = case.experts, _D_MODEL.value, case.d_ff, -(-tokens * case.k // case.experts)
    gated = case.activation == "swiglu"
    key = jax.random.key(0)
    x = jax.random.normal(key, (e, rows, d), dtype)
    hidden = [jax.random.normal(key, (e, rows, f), dtype) for _ in range(1 + gated)]  # buffers of their own
    into = [jax.random.normal(key, (e, d, f), dtype) for _ in range(1 + gated)]
    out_of = jax.random.normal(key, (e, f, d), dtype)

    @jax.jit
    def forward(x, hidden, into, out_of):
        return [jnp.einsum("erd,edf->erf", x, w) for w in into], jnp.einsum("erf,efd->erd", hidden[0], out_of)

    @jax.jit
    def both(x, hidden, into, out_of):
        return (
            forward(x, hidden, into, out_of),
            [jnp.einsum("erf,edf->erd", h, w) for h, w in zip(hidden, into, strict=True)],
            [jnp.einsum("erd,erf->edf", x, h) for h in hidden],
            jnp.einsum("erd,efd->erf", x, out_of),
            jnp.einsum("erf,erd->efd", hidden[0], x),
        )

    arguments = (x, hidden, into, out_of)
    return {"forward": lambda: forward(*arguments), "both": lambda: both(*arguments)}


def model_config(tokens: int, case: Case, dtype: str) -> Any:
    """The model of which the case is a layer."""
    from moe.config import ModelConfig, MoEConfig

    moe = MoEConfig(
        gate=case.gate,
        num_experts=case.experts,
        experts_per_token=case.k,
        d_ff=case.d_ff,
        dispatch=case.mode,
        group_size=_GROUP.value or (min(512, tokens) if case.mode == "einsum" else tokens),
        capacity_factor=_CAPACITY.value,
    )
    return ModelConfig(d_model=_D_MODEL.value, activation=case.activation, dtype=dtype, moe=moe)


def layer(tokens: int, case: Case, dtype: str) -> tuple[dict[str, Callable[[], Any]], float]:
    """The layer's programs, router and losses included, and the share of its pairs that it drops."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from moe.config import Config
    from moe.layers.moe_layer import MoELayer
    from moe.parallel import partition_specs, target
    from moe.parallel.mesh import axis_size
    from moe.routing.registry import GATES
    from moe.routing.resolve import resolve
    from moe.routing.routing import Routing, route

    config = resolve(Config(model=model_config(tokens, case, dtype))).model
    graphdef, parameters, rest = nnx.split(MoELayer(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    rows = 1 if not _MESH.value else axis_size(*partition_specs.TOKEN_AXES)
    x = jax.random.normal(jax.random.key(1), (rows, tokens // rows, _D_MODEL.value), dtype)
    mask = jnp.ones(x.shape[:2], bool)
    replayed: Routing | None = None
    if _SKEW.value != 1.0:
        # Gumbel top-k: choices of a token are drawn without replacement, by share.
        draws = jax.random.gumbel(jax.random.key(2), (*x.shape[:2], case.experts))
        logits = draws.at[..., 0].add(np.log(_SKEW.value)).reshape(-1, config.moe.group_size, case.experts)
        masks = mask.reshape(logits.shape[:2])
        replayed = route(GATES["mixtral"], logits, masks, experts_per_token=case.k)
    if not jax.sharding.get_abstract_mesh().empty:
        mesh = jax.sharding.get_mesh()
        x, mask = jax.device_put((x, mask), jax.NamedSharding(mesh, partition_specs.BATCH))
        parameters = jax.device_put(
            parameters, partition_specs.shardings(mesh, partition_specs.parameter_specs(parameters))
        )

    def forward(parameters, x):
        module = nnx.merge(graphdef, parameters, rest)
        y, report, _ = module(x, mask, routing=replayed, train=True)
        return y, report

    def loss(parameters, x):
        y, report = forward(parameters, x)
        return jnp.sum(y.astype(jnp.float32) * x) + report.load_balancing_loss

    options = target.compiler_options(jax.devices()[0].device_kind) or None
    run = jax.jit(forward, compiler_options=options)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=options)
    dropped = float(run(parameters, x)[1].fraction_tokens_dropped)
    return {"forward": lambda: run(parameters, x), "both": lambda: gradient(parameters, x)}, dropped


def experts_alone(tokens: int, case: Case, dtype: str) -> dict[str, Callable[[], Any]]:
    """The programs of the case's experts on rows that lie sorted by expert, as many for each."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from moe.config import Config
    from moe.dispatch.grouped_matmul.row_blocks import choose_row_blocks
    from moe.layers.experts import Experts
    from moe.parallel import target
    from moe.routing.resolve import resolve

    dropless = dataclasses.replace(case, mode="dropless")
    config = resolve(Config(model=model_config(tokens, dropless, dtype))).model
    graphdef, parameters = nnx.split(Experts(config, rngs=nnx.Rngs(0)))
    num_rows = -(-tokens * case.k // case.experts) * case.experts
    row_blocks = choose_row_blocks(num_rows, case.experts)
    sizes = row_blocks.padded_sizes(jnp.full((case.experts,), num_rows // case.experts, jnp.int32))
    rows = jax.random.normal(jax.random.key(1), (row_blocks.total_rows(num_rows, case.experts), _D_MODEL.value), dtype)

    def forward(parameters, rows, sizes):
        experts = nnx.merge(graphdef, parameters)
        return experts.grouped(experts.matrices(rows.dtype), rows, sizes, row_blocks)

    def loss(parameters, rows, sizes):
        return jnp.sum(forward(parameters, rows, sizes).astype(jnp.float32) * rows)

    options = target.compiler_options(jax.devices()[0].device_kind) or None
    run = jax.jit(forward, compiler_options=options)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=options)
    arguments = (parameters, rows, sizes)
    return {"forward": lambda: run(*arguments), "both": lambda: gradient(*arguments)}


def active_flops(tokens: int, case: Case) -> dict[str, int]:
    """Of the experts' matmuls on chosen pairs."""
    forward = 2 * (3 if case.activation == "swiglu" else 2) * tokens * case.k * _D_MODEL.value * case.d_ff
    return {"forward": forward, "both": 3 * forward}


def large_matmul(side: int) -> Callable[[], Any]:
    """One square matmul."""
    import jax
    import jax.numpy as jnp

    matrix = jnp.ones((side, side), _DTYPE.value)
    multiply = jax.jit(lambda a, b: a @ b)
    return lambda: multiply(matrix, matrix)


def accelerator_roof(tokens: int, case: Case, dtype: str, rate: float) -> dict[str, float]:
    """Seconds by the rate of one large matmul, or by the bandwidth of a copy where that takes longer."""
    import jax
    import jax.numpy as jnp

    work = active_flops(tokens, case)["forward"]
    weights = (3 if case.activation == "swiglu" else 2) * case.experts * _D_MODEL.value * case.d_ff
    weights *= jnp.dtype(dtype).itemsize
    big = jnp.ones((1 << 28,), jnp.int8)
    copy = jax.jit(lambda a: a + 1)
    jax.block_until_ready(copy(big))
    start = time.perf_counter()
    jax.block_until_ready([copy(big) for _ in range(8)])
    bandwidth = 8 * 2 * big.size / (time.perf_counter() - start) * jax.device_count()
    return {"forward": max(work / rate, weights / bandwidth), "both": max(3 * work / rate, 3 * weights / bandwidth)}


def bench_layers() -> list[dict[str, Any]]:
    """All cases; those of one shape and number of experts in turns with their roof."""
    import jax

    from scripts import timing

    rows = []
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases():
        groups.setdefault((case.shape, case.experts, case.k, case.d_ff), []).append(case)
    print(
        f"{'case':44} {'pass':8} {'median ms':>9} {'min':>7} {'max':>7} "
        f"{'share of roof':>13} {'by minima':>9} {'by CPU time':>11} {'of matmul':>9} {'dropped':>8}"
    )
    for members in groups.values():
        programs: dict[tuple[Case | None, str], Callable[[], Any]] = {}
        drops: dict[Case, float] = {}
        on_cpu = jax.default_backend() == "cpu"
        if on_cpu:
            programs |= {(None, which): f for which, f in roof(_TOKENS.value, members[0], _DTYPE.value).items()}
        for case in members:
            if case.mode == "experts alone":
                programs |= {(case, which): f for which, f in experts_alone(_TOKENS.value, case, _DTYPE.value).items()}
                drops[case] = 0.0
                continue
            try:
                made, drops[case] = layer(_TOKENS.value, case, _DTYPE.value)
            except ValueError as refusal:
                print(f"{_name(case):44} refused: {refusal}")
                continue
            programs |= {(case, which): f for which, f in made.items()}
        side = 2048 if on_cpu else 8192
        times = timing.in_turns(programs | {"large matmul": large_matmul(side)}, _REPEATS.value)
        large = statistics.median(times.pop("large matmul").clock)
        rate = 2 * side**3 / large * (1 if on_cpu else jax.device_count())
        work = active_flops(_TOKENS.value, members[0])
        if on_cpu:
            roofs = {which: times[None, which].clock for which in ("forward", "both")}
        else:
            fixed = accelerator_roof(_TOKENS.value, members[0], _DTYPE.value, rate)
            roofs = {which: [value] * _REPEATS.value for which, value in fixed.items()}
        for (case, which), seconds in times.items():
            values = seconds.clock
            median = statistics.median(values)
            name = f"{members[0].shape} E={members[0].experts} roof" if case is None else _name(case)
            # Each turn's own ratio: a machine that is slow for a while is slow for both.
            share = statistics.median(r / own for r, own in zip(roofs[which], values, strict=True))
            # Of a machine whose host is shared, the steadiest: what others take is not counted.
            by_processor = None
            if on_cpu:
                pairs = zip(times[None, which].processor, seconds.processor, strict=True)
                by_processor = statistics.median(r / own for r, own in pairs)
            of_minima, of_matmul = min(roofs[which]) / min(values), work[which] / median / rate
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
    """All cases compiled for the topology, every device with tokens of its own."""
    from moe.config import Config, DataConfig, MeshConfig, TrainConfig, validate_mesh
    from moe.parallel.mesh import make_mesh
    from moe.planner import layer as pods_layer
    from moe.planner.topology import get_topology
    from moe.routing.resolve import resolve

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
        config = resolve(
            Config(
                model=model_config(_TOKENS.value, case, _DTYPE.value),
                mesh=mesh,
                data=DataConfig(sequence_length=_TOKENS.value),
                train=TrainConfig(batch_size=rows),
            )
        )
        validate_mesh(config, shape)
        for which in ("forward", "both"):
            reading = pods_layer.read_layer(config, topology, _TOKENS.value, backward=which == "both")
            print(pods_layer.render(_name(case), which, reading), flush=True)
            found.append(dataclasses.asdict(case) | {"name": _name(case), "pass": which} | reading.to_json())
    return found


def _name(case: Case) -> str:
    return f"{case.shape} E={case.experts} k={case.k} {case.gate} {case.mode}"


def bench_model() -> list[dict[str, Any]]:
    """Train steps of the 4-layer model by mode, in turns with its matmuls: the experts' as batched, all others at the
    rate of one large matmul."""
    import jax
    import numpy as np

    from moe.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig
    from moe.models import flops
    from moe.routing.resolve import resolve
    from moe.training import matmul_rate
    from moe.training.step import build, place
    from scripts import timing

    length, batch_size, layers, f = 512, _TOKENS.value // 512, 4, _D_FF.value or 1792
    mesh = jax.sharding.get_mesh()
    states, programs, drops = {}, {}, {}
    experts = Case("A", "mixtral", "", 8, 2, f, "swiglu")
    config = None
    for mode in _MODES.value:
        model = ModelConfig(
            d_model=_D_MODEL.value,
            num_layers=layers,
            num_heads=_D_MODEL.value // 64,
            num_kv_heads=_D_MODEL.value // 64,
            head_dim=64,
            d_ff=f,
            dtype=_DTYPE.value,
            vocab_size=8192,
            tie_embeddings=False,
            moe=MoEConfig(num_experts=8, dispatch=mode),
        )
        config = resolve(
            Config(
                model=model,
                data=DataConfig(sequence_length=length),
                train=TrainConfig(batch_size=batch_size),
            )
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
    programs["roof"] = roof(_TOKENS.value, experts, _DTYPE.value)["both"]
    programs["large matmul"] = lambda: rates.append(matmul_rate.measured_matmul_rate(_DTYPE.value, repeats=1))
    seconds = {name: times.clock for name, times in timing.in_turns(programs, _REPEATS.value).items()}
    total, active = flops.count_parameters(config.model)
    expert_flops = 6 * _TOKENS.value * 2 * 3 * _D_MODEL.value * f * layers
    rest = flops.train_flops_per_token(config.model, length) * _TOKENS.value - expert_flops
    at_roof = layers * statistics.median(seconds["roof"]) + rest / statistics.median(rates)
    print(
        f"{total:,} parameters, {active:,} active; {batch_size} x {length} tokens; at the roof {at_roof * 1e3:.0f} ms"
    )
    rows = []
    for mode in _MODES.value:
        median, dropped = statistics.median(seconds[mode]), float(np.mean(drops[mode]))
        print(
            f"{mode:10} train step: median {median * 1e3:.0f} ms, {min(seconds[mode]) * 1e3:.0f} to "
            f"{max(seconds[mode]) * 1e3:.0f}; {median / at_roof:.2f} x the roof; {100 * dropped:.1f} % of pairs dropped"
        )
        fields = {"seconds": seconds[mode], "roof": at_roof, "dropped": dropped}
        rows.append({"name": f"train step {mode}"} | fields)
    return rows


def main() -> None:
    """Flags in, a table and perhaps a file out."""
    import jax

    from moe.config import MeshConfig
    from moe.parallel import partition_specs
    from moe.parallel.mesh import make_mesh

    check()
    sizes = {axis: 1 for axis in partition_specs.AXES} | {
        axis: int(size) for axis, size in (entry.split("=") for entry in _MESH.value)
    }
    if _TOPOLOGY.value:
        _write({"topology": _TOPOLOGY.value}, read_layers(sizes))
        return
    count = 1
    for size in sizes.values():
        count *= size
    device = jax.devices()[0]
    print(
        f"{device.device_kind} x {count}, {_DTYPE.value}, {_TOKENS.value} tokens, d {_D_MODEL.value}; "
        f"{platform.allocator()}; median of {_REPEATS.value}"
    )
    with jax.set_mesh(make_mesh(MeshConfig(**sizes), jax.devices()[:count])):
        rows = bench_model() if _MODEL.value else bench_layers()
    _write({"device": device.device_kind, "devices": count, "allocator": platform.allocator()}, rows)


def _write(setting: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """All numbers to --json."""
    if _JSON.value:
        values = {flag: flags.FLAGS[flag].value for flag in ("tokens", "dtype", "skew", "d_model", "group_size")}
        Path(_JSON.value).write_text(json.dumps(setting | values | {"rows": rows}, indent=1))


if __name__ == "__main__":
    cli.run(main)
