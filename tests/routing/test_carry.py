"""What a router hands on to the MoE layer above it: values, gradients, meshes, generation, refusals."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import ConfigError, MeshConfig, ModelConfig
from moe.config.layer_kinds import layer_kinds
from moe.layers.moe_layer import MoELayer
from moe.layers.parameter import matrix, zeros
from moe.layers.router import Router
from moe.models import sampling
from moe.models.block import Block
from moe.models.decoder import make_rows
from moe.models.segments import unstack_layers
from moe.parallel import partition_specs
from moe.parallel.mesh import make_mesh
from moe.routing.carry import first_carry
from moe.routing.gates import TopK
from moe.routing.own_gates import probe
from tests.helpers import mixed, random_parameters, slow_case, tiny_model
from tests.models.test_generate import GREEDY, PROMPTS, _without_cache

VECTOR = "tests.routing.test_carry:Vector"
H = 3


class VectorRouter(Router):
    """Logits of a vector r = x·W_down + decay·(r of the layer below), as ZAYA's router averages over depth."""

    def __init__(self, config, *, kind, rngs):
        super().__init__(config, kind=kind, rngs=rngs)
        self.down = matrix(rngs, (config.d_model, H), partition_specs.REPLICATED, fan_in=config.d_model, scale=1.0)
        self.out = matrix(rngs, (H, config.moe.num_experts), partition_specs.REPLICATED, fan_in=H, scale=1.0)
        self.decay = zeros((H,))

    def __call__(self, x, *, carry, **noise):
        vector = x.astype(jnp.float32) @ self.down[...] + self.decay[...] * carry
        return vector @ self.out[...], vector


class VectorMoE(MoELayer):
    router_class = VectorRouter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vector(TopK):
    layer = VectorMoE

    def first_carry(self, num_experts):
        return jnp.full(H, 0.5)


@pytest.fixture(scope="module", autouse=True)
def guide(tmp_path_factory):
    """The module my_layers of docs/own_gates.md."""
    folder = tmp_path_factory.mktemp("mine")
    text = (Path(__file__).resolve().parents[2] / "docs" / "own_gates.md").read_text()
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "my_layers.py" in block]
    (folder / "my_layers.py").write_text("".join(blocks))
    sys.path.insert(0, str(folder))
    yield importlib.import_module("my_layers")
    sys.path.remove(str(folder))
    del sys.modules["my_layers"]


def _logits(gate: str, router: dict[str, Any], h: Any, carry: Any) -> tuple[Any, Any]:
    """(logits, carry) of a router by its equations; [B,T,...]."""
    if gate == VECTOR:
        vector = h @ router["down"] + router["decay"] * carry
        return vector @ router["out"], vector
    logits = h @ router["kernel"] + carry @ router["residual"]
    return logits, logits


def _by_hand(gate: str, config: ModelConfig, parameters: Any, tokens: Any) -> Any:
    """Hidden states of a plain loop over the layers, in which every expert sees every token; [B,T,D]."""
    rows, layers = make_rows(tokens, None, None), unstack_layers(config, parameters)
    x = parameters["embedding"]["table"][tokens]
    carry = jnp.full((*tokens.shape, H), 0.5) if gate == VECTOR else jnp.zeros((*tokens.shape, 4))
    for layer, kind in enumerate(layer_kinds(config)):
        graphdef, state = nnx.split(nnx.eval_shape(lambda kind=kind: Block(config, kind, rngs=nnx.Rngs(0))))
        own = jax.tree_util.tree_map_with_path(
            lambda path, _, layer=layer: layers[layer, tuple(key.key for key in path)], nnx.to_pure_dict(state)
        )
        block = nnx.merge(graphdef, own)
        x = mixed(block, x, rows)
        h = block.ffn_norm(x)
        if not kind.sparse:
            x = x + block.dense(h)
            continue
        logits, carry = _logits(gate, own["moe"]["router"], h, carry)
        probs = jax.nn.softmax(logits)
        chosen = probs >= jnp.sort(probs, axis=-1)[..., -2:-1]  # the two highest of four
        experts = own["moe"]["experts"]
        hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", h, experts["gate"]))
        hidden *= jnp.einsum("btd,edf->btef", h, experts["up"])
        outputs = jnp.einsum("btef,efd->bted", hidden, experts["down"])
        x = x + jnp.einsum("bte,bted->btd", jnp.where(chosen, probs, 0.0), outputs)
    return x


@pytest.mark.parametrize("gate", [slow_case(VECTOR), "my_layers:Residual"])
@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        # Two equal groups of a dense and an MoE layer, or of a dense and two MoE layers.
        (
            {},
            {"num_layers": 4, "layers": (1, 3), "remat": "full", "dispatch": "einsum", "capacity_factor": 2.0},
        ),
        slow_case({}, {"num_layers": 6, "layers": (1, 2, 4, 5), "remat": "full"}),
        slow_case({}, {"num_layers": 3, "first_dense": 1, "scan_layers": False}),
        slow_case({"fsdp": 2, "expert": 2, "context": 2}, {"num_layers": 2, "remat": "attention", "group_size": 4}),
    ],
)
def test_values_and_gradients_are_those_of_a_plain_loop(gate, sizes, settings):
    config = tiny_model(**{"gate": gate, "dispatch": "dropless", "experts_per_token": 2, **settings})
    graphdef, parameters = random_parameters(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (4, 8))
    weights = np.random.default_rng(2).normal(size=(4, 8, config.d_model)).astype(np.float32)

    def of_model(parameters):
        hidden = nnx.merge(graphdef, parameters)(tokens, train=True).hidden
        return jnp.sum(weights * hidden), hidden

    def of_loop(parameters):
        hidden = nnx.merge(graphdef, parameters).final_norm(_by_hand(gate, config, parameters, tokens))
        return jnp.sum(weights * hidden), hidden

    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[: int(np.prod([1, *sizes.values()]))])
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(of_model, has_aux=True))(parameters)
    expected = jax.jit(jax.value_and_grad(of_loop, has_aux=True))(parameters)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * max(1.0, float(np.abs(b).max()))),
        found,
        expected,
    )
    router = unstack_layers(config, found[1])
    last = max(layer for layer, path in router if path[:2] == ("moe", "router"))
    name = "decay" if gate == VECTOR else "residual"
    assert np.abs(router[last, ("moe", "router", name)]).max() > 0.01  # the carry arrives, with a gradient


def test_text_with_a_cache_is_that_without(guide):
    config = tiny_model(gate=VECTOR, dispatch="einsum", num_layers=2)
    _, variables = random_parameters(config)
    found = sampling.sample(config, variables, PROMPTS, 5, GREEDY)
    np.testing.assert_array_equal(np.stack(found), np.stack(_without_cache(config, variables, PROMPTS, 5)))


def test_padding_hands_on_zeros():
    gate = Vector(k=1)
    layer = VectorMoE(d_model=4, d_ff=4, num_experts=4, gate=gate, dispatch="dropless", rngs=nnx.Rngs(0))
    carry = jnp.ones((1, 3, H))
    layer.router.decay[...] = jnp.ones(H)
    routing = jax.jit(lambda x, mask: layer(x, mask, carry=carry)[2])(
        jnp.zeros((1, 3, 4)), jnp.array([[1, 1, 0]], bool)
    )
    np.testing.assert_array_equal(routing.carry, [[[1] * H, [1] * H, [0] * H]])


def test_wrong_carries_are_refused(monkeypatch):
    monkeypatch.setattr(
        Vector, "route", lambda self, logits, inputs: TopK.route(self, logits, inputs)._replace(carry=logits)
    )
    with pytest.raises(ConfigError, match=r"gate Vector: carry is float32\[2, 8, 4\], must be float32\[2, 8, 3\]"):
        probe(Vector(), 4)
    monkeypatch.setattr(Vector, "first_carry", lambda self, num_experts: jnp.zeros(2, jnp.int32))
    with pytest.raises(ConfigError, match=r"first_carry returns int32\[2\]: must be float32 arrays"):
        probe(Vector(), 4)
    for carry, error in ((lambda: "x", "TypeError"), (lambda: 1 / 0, "ZeroDivisionError: division by zero")):
        monkeypatch.setattr(Vector, "first_carry", lambda self, num_experts, carry=carry: carry())
        with pytest.raises(ConfigError, match=f"gate .*Vector.*: first_carry raises {error}"):
            first_carry([Vector()], 4)


def test_gates_of_a_model_hand_on_the_same_shapes(guide):
    with pytest.raises(ConfigError, match=r"first_carry returns float32\[4\]: must have the shapes of gate .*Vector"):
        first_carry([TopK(), Vector(), guide.Residual()], 4)
