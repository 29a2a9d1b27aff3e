"""The mesh, and the contract on compiled programs: what crosses devices, over which axis; no mesh changes a value.

Per MoE layer, two all-to-alls of expert slots forward and four with the gradient, over the expert axis; none without
one. Parameters are gathered over the axes that split them in storage; tokens are never gathered.
"""

import collections
import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe.config import ConfigError, MeshConfig
from moe.dispatch.buffers import expert_capacity
from moe.lab.benchmarks import layer_programs
from moe.layers.moe_layer import MoELayer
from moe.layers.parameter import parameter, zeros
from moe.models.factory import abstract_model
from moe.parallel import mesh as mesh_module
from moe.parallel import parameters as weights
from moe.parallel import partition_specs, target
from moe.parallel.device_kinds import DeviceKind
from moe.parallel.mesh import ROW_AXES, constrain, make_mesh
from tests.helpers import axis_groups, collectives, random_parameters, slow_case, tiny_model

P = jax.sharding.PartitionSpec
# T equals no other dim and divides none: an array with this dim holds tokens.
B, T, E = 8, 11, 8


def _mesh(sizes):
    return make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])


def _place(mesh, tree, spec=None):
    if spec is None:
        return jax.device_put(nnx.to_pure_dict(tree), weights.parameter_shardings(mesh, tree))
    return jax.device_put(tree, partition_specs.shardings(mesh, jax.tree.map(lambda _: spec, tree)))


def _check_contract(compiled, mesh, parameters, config, *, all_to_alls):
    """Assert the contract of moe.parallel.mesh on a compiled program of B rows of T tokens."""
    found = collectives(compiled.as_text(), mesh.size)
    by_kind = collections.defaultdict(list)
    for collective in found:
        by_kind[collective.kind].append(collective)
    assert set(by_kind) <= {"all-to-all", "all-gather", "all-reduce", "reduce-scatter"}, found

    # All-to-alls move exactly the slots, between devices that differ only along the expert axis.
    exchanges = by_kind["all-to-all"]
    assert len(exchanges) == (all_to_alls if mesh.shape["expert"] > 1 else 0), exchanges
    moe = config.moe
    capacity = expert_capacity(moe.capacity.train, moe.experts_per_token, T, moe.num_experts)
    token_shards = math.prod(mesh.shape.get(axis, 1) for axis in ROW_AXES)
    slots = moe.num_experts * (B // token_shards) * capacity * config.d_model
    for exchange in exchanges:
        assert exchange.groups == axis_groups(mesh, "expert"), exchange.text
        assert sum(math.prod(shape) for shape in exchange.shapes) == slots, exchange.text

    # Only parameters are gathered, over one token axis after another (experts not over the expert axis), and they stay
    # split over the other axes.
    gathered = {use for use in _gathered_parameters(mesh, parameters) if len(next(iter(use[1]))) > 1}
    assert (len(by_kind["all-gather"]) > 0) == (len(gathered) > 0)
    for gather in by_kind["all-gather"]:
        assert all((_dims(shape), gather.groups) in gathered for shape in gather.shapes), gather.text

    # Partial sums of tokens exist only where heads or F are split.
    for reduce in by_kind["all-reduce"] + by_kind["reduce-scatter"]:
        if any(size % T == 0 for shape in reduce.shapes for size in shape):
            assert reduce.groups == axis_groups(mesh, "tensor"), reduce.text


def _dims(shape):
    """Sorted sizes without ones: XLA transposes and squeezes freely."""
    return tuple(sorted(size for size in shape if size != 1))


def _axes(entry):
    """Mesh axes of a PartitionSpec or of one of its entries."""
    return [entry] if isinstance(entry, str) else [axis for part in entry or () for axis in _axes(part)]


def _names(path):
    return [key.key for key in path]


def _leaves(parameters):
    """(names, leaf, spec) of each parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(parameters))
    specs = jax.tree.leaves(weights.parameter_specs(parameters), is_leaf=lambda leaf: isinstance(leaf, P))
    return [(_names(path), leaf, spec) for (path, leaf), spec in zip(leaves, specs, strict=True)]


def _random_parameters(config):
    """(graphdef, state) of a model."""
    graphdef, parameters = random_parameters(config)
    return graphdef, nnx.state(nnx.merge(graphdef, parameters))


def _gathered_parameters(mesh, parameters):
    """(dims, groups of devices) of each parameter of a layer after each step of its gathering: over ``expert``, except
    for experts, then over ``fsdp``. Heads and their dim may be joined into one axis."""
    found = set()
    for names, leaf, spec in _leaves(parameters):
        whole = set()
        for over in ("fsdp",) if "experts" in names else ("expert", "fsdp"):
            if over not in _axes(spec):
                continue
            whole.add(over)
            kept = [math.prod(mesh.shape[axis] for axis in _axes(entry) if axis not in whole) for entry in spec]
            sizes = [size // shards for size, shards in zip(leaf.shape, kept, strict=False)]
            layer = sizes[1:] if names[0].startswith("segment_") else sizes
            found.add((_dims(layer), axis_groups(mesh, over)))
            if names[-2] == "attention" and len(layer) == 3:
                inputs = 2 if names[-1] == "out" else 1
                joined = math.prod(layer[:inputs]), math.prod(layer[inputs:])
                found.add((_dims(joined), axis_groups(mesh, over)))
    return found


def _layer_program(gate, mode, *, gradient):
    """(config, parameters, function) of one MoE layer in training, with noise."""
    config = tiny_model(gate=gate, dispatch=mode, num_experts=E)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MoELayer(config, rngs=nnx.Rngs(0))))
    parameters = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)

    def forward(parameters, x, mask, rng):
        y, report, _ = nnx.merge(graphdef, parameters)(x, mask, train=True, rng=rng)
        return jnp.sum(jnp.square(y)) + report.load_balancing_loss, y, report

    def loss(parameters, x, mask, rng):
        value, _, report = forward(parameters, x, mask, rng)
        return value, report

    return config, parameters, jax.value_and_grad(loss, argnums=(0, 1), has_aux=True) if gradient else forward


@pytest.mark.parametrize(
    ("sizes", "gate", "gradient", "mode"),
    [
        ((1, 1, 8, 1), "mixtral", True, "gather"),
        ((2, 1, 2, 2), "switch", True, "einsum"),
        slow_case((1, 1, 8, 1), "mixtral", True, "einsum"),
        slow_case((2, 1, 2, 2), "switch", True, "gather"),
        *(
            slow_case(sizes, gate, gradient, mode)
            for sizes, gate, gradient in (
                ((1, 2, 4, 1), "gshard", False),  # test_contract_of_the_forward_pass covers a whole model
                ((1, 2, 4, 1), "gshard", True),
                ((2, 2, 2, 1), "mixtral", True),
                ((8, 1, 1, 1), "gshard", True),
                ((2, 2, 1, 2), "switch", True),
            )
            for mode in ("gather", "einsum")
        ),
    ],
    ids=str,
)
def test_contract_of_a_layer(sizes, gate, mode, gradient):
    mesh = _mesh(sizes)
    config, parameters, program = _layer_program(gate, mode, gradient=gradient)
    x, mask = jnp.zeros((B, T, config.d_model)), jnp.ones((B, T), bool)
    with jax.set_mesh(mesh):
        arguments = (_place(mesh, parameters), *_place(mesh, (x, mask), partition_specs.BATCH), jax.random.key(0))
        compiled = jax.jit(program).lower(*arguments).compile()
    _check_contract(compiled, mesh, parameters, config, all_to_alls=4 if gradient else 2)


def test_each_chunk_of_tokens_has_its_exchanges():
    """Per chunk, three all-to-alls on CPUs: sizes and rows to the experts, outputs back. That values equal those of
    one device is shown in tests/dispatch/test_dropless.py."""
    mesh, chunks = _mesh((1, 1, 8, 1)), 3
    layer = MoELayer(d_model=16, d_ff=8, num_experts=E, dispatch="dropless", exchange_chunks=chunks, rngs=nnx.Rngs(0))
    graphdef, parameters = nnx.split(layer)
    with jax.set_mesh(mesh):
        arguments = _place(mesh, parameters), _place(mesh, jnp.zeros((B, 12, 16)), partition_specs.BATCH)
        program = jax.jit(lambda parameters, x: nnx.merge(graphdef, parameters)(x)[0])
        text = program.lower(*arguments).compile().as_text()
    found = [each.kind for each in collectives(text, mesh.size)]
    assert found.count("all-to-all") == 3 * chunks


@pytest.mark.parametrize("low", [False, slow_case(True)])
def test_a_token_goes_once_to_each_host(low):
    """Two hosts of four devices: one all-to-all between hosts each way, with a slot for every token of the two devices
    at the same place, 2·24; all others stay within a host. In 8 bits a row sent there has 16 numbers and a scale of 4
    bytes."""
    mesh = _mesh((1, 1, 8, 1))
    settings = {"low_precision": "float8", "low_precision_in": "all"} if low else {}
    layer = MoELayer(tiny_model(dispatch="dropless", num_experts=E, exchange_hosts=2, **settings), rngs=nnx.Rngs(0))
    graphdef, parameters = nnx.split(layer)
    with jax.set_mesh(mesh):
        arguments = _place(mesh, parameters), _place(mesh, jnp.zeros((B, 24, 16)), partition_specs.BATCH)
        program = jax.jit(lambda parameters, x: nnx.merge(graphdef, parameters)(x)[0])
        text = program.lower(*arguments).compile().as_text()
    found = [each for each in collectives(text, mesh.size) if each.kind == "all-to-all"]
    between = [each for each in found if each.groups == {frozenset((place, place + 4)) for place in range(4)}]
    assert [each.shapes for each in between] == [2 * ((24, 20 if low else 16),), 2 * ((24, 16),)]
    hosts = {frozenset(range(4)), frozenset(range(4, 8))}
    assert all(each.groups == hosts for each in found if each not in between)


def test_gathered_tokens_use_an_all_gather_and_a_reduce_scatter():
    """An all-gather brings all tokens, 24 of each of eight devices, to every device, a reduce-scatter its sums back;
    there is no all-to-all."""
    mesh = _mesh((1, 1, 8, 1))
    layer = MoELayer(tiny_model(dispatch="dropless", num_experts=E, exchange="all_gather"), rngs=nnx.Rngs(0))
    graphdef, parameters = nnx.split(layer)
    with jax.set_mesh(mesh):
        arguments = _place(mesh, parameters), _place(mesh, jnp.zeros((B, 24, 16)), partition_specs.BATCH)
        program = jax.jit(lambda parameters, x: nnx.merge(graphdef, parameters)(x)[0])
        text = program.lower(*arguments).compile().as_text()
    found = collectives(text, mesh.size)
    assert "all-to-all" not in {each.kind for each in found}
    assert ((8 * 24, 16),) in [each.shapes for each in found if each.kind == "all-gather"]
    assert [each.shapes for each in found if each.kind == "reduce-scatter"] == [((24, 16),)]


def test_contract_of_the_forward_pass():
    mesh = _mesh((1, 2, 2, 2))
    config = tiny_model(num_experts=E, num_layers=4, every=2, eval_capacity_factor=1.25)
    graphdef, parameters = _random_parameters(config)
    tokens = jnp.zeros((B, T), jnp.int32)
    with jax.set_mesh(mesh):
        program = jax.jit(lambda parameters, tokens: nnx.merge(graphdef, parameters)(tokens).logits)
        compiled = program.lower(_place(mesh, parameters), _place(mesh, tokens, partition_specs.BATCH)).compile()
    _check_contract(compiled, mesh, parameters, config, all_to_alls=2)


def _loss(graphdef, parameters, tokens, rng):
    output = nnx.merge(graphdef, parameters)(tokens, train=True, rng=rng)
    nll = jax.nn.logsumexp(output.logits, -1) - jnp.take_along_axis(output.logits, tokens[..., None], -1)[..., 0]
    return jnp.mean(nll) + 0.1 * jnp.sum(output.layers.load_balancing_loss), output.layers


@functools.cache
def _case(gate, mode, num_layers):
    """(config, parameters, tokens, rng, value-and-gradient function)."""
    config = tiny_model(gate=gate, dispatch=mode, num_experts=E, num_layers=num_layers, every=2, jitter=0.1)
    graphdef, parameters = _random_parameters(config)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (B, T)), jnp.int32)
    rng = jax.random.key(2)
    program = jax.value_and_grad(functools.partial(_loss, graphdef), has_aux=True)
    return config, parameters, tokens, rng, program


@functools.cache
def _without_mesh(gate, num_layers):
    """Values that neither mesh nor mode may change, from the einsum mode on one device, which compiles fastest."""
    _, parameters, tokens, rng, program = _case(gate, "einsum", num_layers)
    return jax.tree.map(np.asarray, jax.jit(program)(nnx.to_pure_dict(parameters), tokens, rng))


@pytest.mark.parametrize(
    ("sizes", "mode", "gate", "num_layers"),
    [
        slow_case((1, 2, 2, 2), "gather", "gshard", 4),
        ((2, 2, 2, 1), "einsum", "gshard", 2),
        slow_case((2, 2, 2, 1), "einsum", "gshard", 4),
        slow_case((1, 1, 1, 1), "gather", "mixtral", 4),
        slow_case((1, 1, 2, 2), "einsum", "mixtral", 4),
        slow_case((8, 1, 1, 1), "einsum", "mixtral", 4),
        slow_case((1, 8, 1, 1), "gather", "mixtral", 4),
        slow_case((2, 2, 2, 1), "gather", "mixtral", 4),
        slow_case((2, 2, 1, 2), "gather", "gshard", 4),
    ],
    ids=str,
)
def test_no_mesh_changes_loss_gradients_or_reports(sizes, mode, gate, num_layers):
    """The train program also keeps the contract: a dense and an MoE block, once or scanned, have four all-to-alls."""
    mesh = _mesh(sizes)
    config, parameters, tokens, rng, program = _case(gate, mode, num_layers)
    with jax.set_mesh(mesh):
        arguments = (_place(mesh, parameters), _place(mesh, tokens, partition_specs.BATCH), rng)
        gradients_lie = weights.parameter_shardings(mesh, parameters)
        compiled = jax.jit(program, out_shardings=(None, gradients_lie)).lower(*arguments).compile()
        (loss, layers), gradients = compiled(*arguments)
    (expected_loss, expected_layers), expected_gradients = _without_mesh(gate, num_layers)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)

    def check(path, ours, theirs):
        bound = 1e-5 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=bound, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, (layers, gradients), (expected_layers, expected_gradients))
    if mesh.size > 1:
        _check_contract(compiled, mesh, parameters, config, all_to_alls=4)


def test_gradients_are_worth_comparing():
    """Every parameter has a nonzero gradient, and every MoE layer drops assignments."""
    (_, layers), gradients = _without_mesh("gshard", 2)
    for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        assert np.abs(gradient).max() > 0, path
    assert (layers.fraction_tokens_dropped > 0).all()


@pytest.mark.slow
def test_remat_full_repeats_the_exchange_of_the_forward_pass():
    mesh = _mesh((1, 2, 4, 1))
    config = tiny_model(num_experts=E, remat="full")
    graphdef, parameters = _random_parameters(config)
    with jax.set_mesh(mesh):
        arguments = (_place(mesh, parameters), _place(mesh, jnp.zeros((B, T), jnp.int32), partition_specs.BATCH), None)
        program = jax.jit(jax.value_and_grad(functools.partial(_loss, graphdef), has_aux=True))
        compiled = program.lower(*arguments).compile()
    _check_contract(compiled, mesh, parameters, config, all_to_alls=4 + 2)


# The mesh and the table.


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1, 1)),
        ({"expert": 4}, (2, 1, 4, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 1, 2)),
        ({"data": 2, "fsdp": 2, "expert": 2}, (2, 2, 2, 1)),
    ],
    ids=str,
)
def test_make_mesh_infers_the_remaining_axis(sizes, shape):
    mesh = make_mesh(MeshConfig(**sizes))
    assert mesh.axis_names == ("data", "fsdp", "expert", "tensor")
    assert mesh.devices.shape == shape
    assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()}


def test_any_axis_may_span_hosts_with_gpus():
    # With GPUs each host is a separate slice, and devices are listed in any order.
    gpus = [types.SimpleNamespace(platform="gpu", id=i, slice_index=i // 4) for i in reversed(range(8))]
    arranged = mesh_module._arrange(("data", "fsdp", "expert", "tensor"), (1, 2, 4, 1), gpus)
    assert [[device.id for device in host] for host in arranged[0, :, :, 0]] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("sizes", [{"data": 3}, {"expert": 3}, {"expert": 16}, {"data": 4, "fsdp": 1}], ids=str)
def test_make_mesh_refuses_sizes_that_do_not_multiply_to_the_devices(sizes):
    with pytest.raises(ConfigError, match=r"mesh\.data=.*must multiply to the number of devices, 8") as refused:
        make_mesh(MeshConfig(**sizes))
    more = "XLA_FLAGS=--xla_force_host_platform_device_count=16 in front of the command makes 16 devices"
    assert (more in str(refused.value)) == (sizes == {"expert": 16})


MODELS = [
    {},
    {"gate": "none"},
    {"tie_embeddings": True, "qk_norm": "head"},
    {"num_layers": 5, "every": 2, "first_dense": 1, "activation": "relu", "qk_norm": "full"},
    {"gate": "switch", "num_layers": 4, "first_dense": 1},
]


#: PartitionSpecs of matrices, by the last two names of their path.
MATRICES = {
    "embedding.table": P("tensor", ("fsdp", "expert")),
    "unembedding.kernel": P(("fsdp", "expert"), "tensor"),
    "attention.query": P(("fsdp", "expert"), "tensor", None),
    "attention.key": P(("fsdp", "expert"), "tensor", None),
    "attention.value": P(("fsdp", "expert"), "tensor", None),
    "attention.out": P("tensor", None, ("fsdp", "expert")),
    "dense.gate": P(("fsdp", "expert"), "tensor"),
    "dense.up": P(("fsdp", "expert"), "tensor"),
    "dense.down": P("tensor", ("fsdp", "expert")),
    "experts.gate": P("expert", "fsdp", "tensor"),
    "experts.up": P("expert", "fsdp", "tensor"),
    "experts.down": P("expert", "tensor", "fsdp"),
    "router.kernel": P(None, None),
}


@pytest.mark.parametrize("overrides", MODELS, ids=str)
def test_every_matrix_is_split_as_its_module_says(overrides):
    model = abstract_model(tiny_model(**overrides))
    matrices = 0
    for names, leaf, spec in _leaves(nnx.state(model, nnx.Param)):
        stacked, name = names[0].startswith("segment_"), ".".join(names[-2:])
        if leaf.ndim - stacked < 2:
            assert not _axes(spec), f"{name} is a vector: replicated"
            continue
        matrices += 1
        assert tuple(spec) == (None,) * stacked + tuple(MATRICES[name]), name
    assert matrices >= 8


def test_a_variable_without_a_spec_is_refused():
    """Instead of being silently replicated."""
    model = abstract_model(tiny_model())
    model.scale = nnx.Param(jnp.ones(3))
    with pytest.raises(ValueError, match=r"scale: made without a PartitionSpec; use .*\.parameter"):
        weights.parameter_specs(nnx.state(model))
    model.scale = jnp.ones(3)
    with pytest.raises(ConfigError, match="scale: made without a PartitionSpec"):
        weights.parameter_specs(nnx.state(model))
    with pytest.raises(ValueError, match="an entry for each axis of a parameter of shape \\(3, 5\\)"):
        zeros((3, 5), P("tensor"))


def test_specs_of_optimizer_state():
    up = P(None, "expert", "fsdp", "tensor")
    parameters = nnx.state(abstract_model(tiny_model()), nnx.Param)
    specs, shapes = weights.parameter_specs(parameters), nnx.to_pure_dict(parameters)
    adam = weights.optimizer_specs(shapes, specs, jax.eval_shape(optax.adam(1e-3).init, shapes))[0]
    assert adam.mu["segment_0"]["block_0"]["moe"]["experts"]["up"] == up
    assert adam.nu["embedding"]["table"] == P("tensor", ("fsdp", "expert"))
    assert adam.count == P()
    # Adafactor keeps a row and a column of each matrix, each split like the dimensions that it keeps.
    large = {"experts": {"up": jax.ShapeDtypeStruct((3, 8, 128, 256), jnp.float32)}}
    state = jax.eval_shape(optax.adafactor(1e-3).init, large)
    factored = weights.optimizer_specs(large, {"experts": {"up": up}}, state)
    kept = {leaf for leaf in jax.tree.leaves(factored, is_leaf=lambda leaf: isinstance(leaf, P)) if leaf != P()}
    assert kept == {P(None, "expert", "fsdp"), P(None, "expert", "tensor")}


def test_a_device_holds_its_share_of_the_experts():
    mesh = _mesh((1, 2, 2, 2))
    config = tiny_model(num_experts=E)
    _, parameters = _random_parameters(config)
    up = _place(mesh, parameters)["segment_0"]["block_0"]["moe"]["experts"]["up"]
    # [L,E,D,F]: layers whole, experts, D and F halved.
    assert up.shape == (2, E, 16, 20)
    assert up.addressable_shards[0].data.shape == (2, E // 2, 8, 10)


def test_constrain_without_a_mesh_does_nothing():
    x = jnp.ones((3, 5))
    assert constrain(x, partition_specs.BATCH) is x


@pytest.mark.parametrize("form", ["cpu", "narrow", "whole"])
@pytest.mark.parametrize("inputs", [1, 2])
def test_projections_onto_heads_and_back(inputs, form, rng, monkeypatch):
    """[D,N,H] and [N,H,D] against an einsum, on a mesh that splits D and N. N and H are one axis on CPUs, and in
    gradients of heads that do not fill the lanes."""
    monkeypatch.setattr(target, "is_cpu", lambda: form == "cpu")
    monkeypatch.setattr(target, "LANES", 3 if form == "whole" else 4)
    shape, spec = [((8, 2, 3), partition_specs.HEADS_IN), ((2, 3, 8), partition_specs.HEADS_OUT)][inputs - 1]
    subscripts = ["btd,dnh->btnh", "btnh,nhd->btd"][inputs - 1]
    weight = jnp.asarray(rng.normal(size=shape), jnp.float32)
    x = jnp.asarray(rng.normal(size=(4, 5, *shape[:inputs])), jnp.float32)

    def ours(x, weight):
        return jnp.sum(jnp.sin(weights.project(x, parameter(weight, spec, inputs=inputs))))

    def plain(x, weight):
        return jnp.sum(jnp.sin(jnp.einsum(subscripts, x, weight)))

    gradients = jax.grad(ours, (0, 1))
    with jax.set_mesh(_mesh((1, 2, 2, 2))):
        actual = jax.jit(gradients)(x, weight)
        products = re.findall(r"dot_general.* -> tensor<([0-9x]+)xf32>", jax.jit(gradients).lower(x, weight).as_text())
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, actual, jax.grad(plain, (0, 1))(x, weight))
    # The result, which the sine's gradient needs, and the gradients of x and of the weight; joined: N·H = 6.
    joined = [product for product in products if "6" in product.split("x")]
    assert len(products) == 3
    assert len(joined) == {"cpu": 2, "narrow": inputs, "whole": 0}[form], products


def test_weights_are_gathered_in_two_hops_where_an_axis_spans_a_3d_torus(monkeypatch):
    class Torus:
        kind = DeviceKind(has_3d_torus=True)

    monkeypatch.setattr(weights, "axis_size", lambda *axes: 64 if "fsdp" in axes else 1)
    assert weights._hops(64) == [None]  # CPUs have no torus
    monkeypatch.setattr(target, "current", Torus)
    first, second = weights._hops(64)  # 4x4x4: 16 rings of the last dimension, then 4 planes
    assert first[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert second[:2] == [list(range(0, 64, 4)), list(range(1, 64, 4))]
    first, second = weights._hops(64, 45)  # 180 rows on 4 rings are not whole tiles: 4 planes, then 16 rings
    assert first == np.arange(64).reshape(4, 16).tolist()
    assert second[:2] == [[0, 16, 32, 48], [1, 17, 33, 49]]
    assert weights._hops(64, 4)[0][0] == [0, 1, 2, 3]  # 16 rows, a tile of bfloat16 and half of one of bytes
    assert weights._hops(64, 4, 32)[0][0] == list(range(16))
    assert weights._hops(8) == [None]
    assert weights._hops(1) == []
    monkeypatch.setattr(
        weights, "axis_size", lambda *axes: 256 if "fsdp" in axes else 1
    )  # fsdp 64 is not the whole mesh: 256 chips with experts split
    assert weights._hops(64) == [None]


def test_a_gather_in_two_hops_equals_one(rng, monkeypatch):
    mesh = make_mesh(MeshConfig(data=1, fsdp=8), jax.devices())
    matrix, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 16, 5), (8, 16)))
    places = np.arange(8).reshape(4, 2)

    def loss(matrix, x):
        def local(shard, x):
            return jnp.einsum("bd,edf->bef", x, weights.gather_shard(shard, 1))

        specs = jax.P(None, "fsdp"), jax.P("fsdp")
        return jnp.sum(
            jnp.sin(jax.shard_map(local, in_specs=specs, out_specs=jax.P("fsdp"), check_vma=False)(matrix, x))
        )

    with jax.set_mesh(mesh):
        one = jax.jit(jax.value_and_grad(loss))(matrix, x)
        monkeypatch.setattr(weights, "_hops", lambda size, rows, tile_rows: [places.tolist(), places.T.tolist()])
        two = jax.jit(jax.value_and_grad(lambda *a: loss(*a)))(matrix, x)
    plain = jax.value_and_grad(lambda m, x: jnp.sum(jnp.sin(jnp.einsum("bd,edf->bef", x, m))))(matrix, x)
    for ours in (one, two):
        np.testing.assert_allclose(ours[0], plain[0], rtol=1e-5)
        np.testing.assert_allclose(ours[1], plain[1], atol=1e-5)


@pytest.mark.parametrize("mode", ["gather", "dropless", "einsum"])
def test_benchmarked_layers_have_groups_that_the_mesh_can_split(mode):
    case = layer_programs.Case("A", "mixtral", mode, 8, 2, 16, 16, "swiglu", 64, 0, -1.0, "float32", 1.0)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, expert=4, tensor=1))):
        assert layer_programs.model_config(case).moe.group_size == 8
