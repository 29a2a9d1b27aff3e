"""Experts that share their matrices but for a product of low rank."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.analysis import surgery
from moe.config import ConfigError, MeshConfig
from moe.layers.moe_layer import MoELayer
from moe.models.flops import count_parameters, train_flops_per_token
from moe.parallel import partition_specs
from moe.parallel.mesh import make_mesh
from tests.helpers import slow_case, tiny_model

NAMES = ("up", "gate", "down")


def run(layer, x, cotangent):
    """y, and the gradients of sum(y·cotangent) by the parameters, as nested dicts."""
    graphdef, parameters = nnx.split(layer)

    def loss(parameters, x):
        y = nnx.merge(graphdef, parameters)(x)[0]
        return jnp.sum(y * cotangent), y

    gradients, y = jax.jit(jax.grad(loss, has_aux=True))(parameters, x)
    return np.asarray(y), jax.tree.map(np.asarray, nnx.to_pure_dict(gradients))


@pytest.mark.parametrize("mode", ["dropless", slow_case("gather"), slow_case("einsum")])
def test_they_compute_what_experts_with_the_merged_matrices_do(mode, rng):
    config = tiny_model(d_model=8, moe_d_ff=8, expert_rank=2, gate="mixtral", dispatch=mode)
    layer = MoELayer(config, rngs=nnx.Rngs(0))
    assert all((layer.experts.pairs[f"{name}_last"][...] == 0).all() for name in NAMES)
    for name in NAMES:
        layer.experts.pairs[f"{name}_last"][...] = jnp.asarray(rng.normal(size=(4, 2, 8)), jnp.float32)
    full = MoELayer(dataclasses.replace(config, moe=dataclasses.replace(config.moe, expert_rank=0)), rngs=nnx.Rngs(0))
    full.router.kernel[...] = layer.router.kernel[...]
    pairs = {name: np.asarray(pair[...]) for name, pair in layer.experts.pairs.items()}
    for name in NAMES:
        merged = [
            np.asarray(getattr(layer.experts, name)[...]) + pairs[f"{name}_first"][e] @ pairs[f"{name}_last"][e]
            for e in range(4)
        ]
        getattr(full.experts, name)[...] = jnp.asarray(np.stack(merged))
    x, cotangent = jnp.asarray(rng.normal(size=(2, 8, 6, 8)), jnp.float32)
    y, gradients = run(layer, x, cotangent)
    expected_y, expected = run(full, x, cotangent)
    np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(gradients["router"]["kernel"], expected["router"]["kernel"], rtol=1e-4, atol=1e-5)
    for name in NAMES:
        by_expert, found = expected["experts"][name], gradients["experts"]  # dW_e; dW = Σ dW_e, dA = dW Bᵀ, dB = Aᵀ dW
        first, last = pairs[f"{name}_first"], pairs[f"{name}_last"]
        np.testing.assert_allclose(found[name], by_expert.sum(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            found["pairs"][f"{name}_first"], by_expert @ last.swapaxes(1, 2), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            found["pairs"][f"{name}_last"], first.swapaxes(1, 2) @ by_expert, rtol=1e-4, atol=1e-5
        )
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, partition_specs.shardings(mesh, partition_specs.BATCH))
        on_eight = run(layer, placed, cotangent)
    for a, b in zip(jax.tree.leaves(on_eight), jax.tree.leaves((y, gradients)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1, np.abs(b).max()))


def test_parameters_and_flops_by_hand():
    """D 16, F 20, 4 experts of rank 3, top-2, two layers: an FFN has 3·16·20 = 960, its pairs 3·3·(16 + 20) = 324 for
    each expert. Two of four experts are active; two rows a token are multiplied by 960 each, and by no pair."""
    low, full = (tiny_model(gate="mixtral", expert_rank=rank) for rank in (3, 0))
    (total, active), (full_total, full_active) = count_parameters(low), count_parameters(full)
    assert full_total - total == 2 * (4 * 960 - 960 - 4 * 324)
    assert full_active - active == 2 * (2 * 960 - 960 - 2 * 324)
    assert train_flops_per_token(low, 8) == train_flops_per_token(full, 8)


def test_what_needs_matrices_of_their_own_is_refused():
    with pytest.raises(
        ConfigError, match=r"model\.moe\.expert_rank=2: surgery needs experts with matrices of their own"
    ):
        surgery.check(tiny_model(expert_rank=2))
    with pytest.raises(ConfigError, match=r"expert_rank=2: must be 0 with bias=all"):
        tiny_model(expert_rank=2, bias="all")
    with pytest.raises(ConfigError, match=r"expert_rank=2: must be 0 with model\.base_"):
        tiny_model(expert_rank=2, base_d_model=8)
