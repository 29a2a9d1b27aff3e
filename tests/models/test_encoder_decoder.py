"""Encoder-decoders: buckets by hand; values and gradients against loops; meshes, scan, remat, cache, padding."""

import dataclasses
import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import MeshConfig, layer_kinds
from moe.config.rope_section import RopeScalingConfig
from moe.layers.attention.scoring import bias_of_rows, relative_bucket
from moe.layers.call import Call, Report
from moe.models import kv_cache, sampling
from moe.models.block import Block
from moe.models.decoder import make_rows
from moe.models.factory import abstract_model
from moe.models.segments import unstack_layers
from moe.models.stack import Flow
from moe.parallel import partition_specs
from moe.parallel.mesh import make_mesh
from moe.parallel.parameters import parameter_specs
from tests.helpers import random_parameters, slow_case, tiny_encoder_decoder

B, T, U = 8, 6, 10


_build = functools.cache(random_parameters)


@functools.cache
def _batch():
    """Packed rows of both stacks: two documents and padding in most, one document in the last."""
    rng = np.random.default_rng(0)

    def side(length):
        segments = np.zeros((B, length), np.int32)
        for b in range(B):
            cuts = np.sort(rng.choice(np.arange(1, length + 1), 2, replace=False))
            segments[b, : cuts[0]], segments[b, cuts[0] : cuts[1]] = 1, 2
        segments[-1] = 1
        starts = np.where(segments == 2, np.argmax(segments == 2, axis=1)[:, None], 0)
        tokens = rng.integers(0, 48, (B, length)).astype(np.int32)
        return tokens, segments, (np.arange(length) - starts).astype(np.int32)

    names = ("tokens", "segment_ids", "positions")
    batch = dict(zip(names, side(T), strict=True))
    batch |= {f"encoder_{name}": array for name, array in zip(names, side(U), strict=True)}
    batch["targets"] = np.where(batch["segment_ids"] > 0, rng.integers(0, 48, (B, T)), -1).astype(np.int32)
    return batch


def _loss(graphdef, parameters, batch, rng=None):
    """A loss of the logits and of both stacks' auxiliary losses, and (logits, encoder output, reports)."""
    model = nnx.merge(graphdef, parameters)
    encoder = {name: batch[name] for name in batch if name.startswith("encoder_")}
    output = model(batch["tokens"], batch["segment_ids"], batch["positions"], train=True, rng=rng, **encoder)
    log_probs = jax.nn.log_softmax(output.logits.astype(jnp.float32))
    known = batch["targets"] >= 0
    nll = -jnp.take_along_axis(log_probs, jnp.where(known, batch["targets"], 0)[..., None], axis=-1)[..., 0]
    loss = jnp.sum(jnp.where(known, nll, 0.0)) / jnp.sum(known)
    if output.layers is not None:
        loss += 0.1 * jnp.sum(output.layers.load_balancing_loss) + 0.01 * jnp.sum(output.layers.router_z_loss)
    return loss, (output.logits, output.encoder_hidden, output.layers)


@functools.cache
def _run(config, batch_name="packed"):
    graphdef, parameters = _build(config)
    run = jax.jit(jax.value_and_grad(functools.partial(_loss, graphdef), has_aux=True))
    return jax.tree.map(np.asarray, run(parameters, _batch(), jax.random.key(0)))


def _assert_trees_close(actual, expected, rtol=1e-5):
    def check(path, ours, theirs):
        bound = rtol * float(np.abs(theirs).max(initial=0.0))
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=bound, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, actual, expected)


# --- Relative positions ----------------------------------------------------------------------------------------------
def test_buckets_by_hand():
    """Bidirectional, 8 buckets up to distance 16: 4 each way, of which 0 and 1 are exact. Beyond, bucket
    2 + floor(2·log(d/2)/log(8)): d = 2…5 gives 2 (log(2.5)/log(8)·2 = 0.88), 6 and more 3 (1.06), at most 3. Keys after
    the query have 4 more. Causal: 0…3 exact, then 4 + floor(4·log(d/4)/log(4)): d = 4, 5 → 4 (0.64), 6, 7 → 5 (1.17),
    8…11 → 6 (2), 12 and more → 7 (3.17); keys after the query share bucket 0.
    """
    before = {0: 0, 1: 1, 2: 2, 3: 2, 4: 2, 5: 2, 6: 3, 15: 3, 16: 3, 99: 3}
    for distance, bucket in before.items():
        assert relative_bucket(np.asarray(-distance), 8, 16, bidirectional=True) == bucket
        if distance:
            assert relative_bucket(np.asarray(distance), 8, 16, bidirectional=True) == bucket + 4
    causal = {0: 0, 3: 3, 4: 4, 5: 4, 6: 5, 7: 5, 8: 6, 11: 6, 12: 7, 16: 7, 99: 7}
    for distance, bucket in causal.items():
        assert relative_bucket(np.asarray(-distance), 8, 16, bidirectional=False) == bucket
    assert relative_bucket(np.asarray(5), 8, 16, bidirectional=False) == 0


def test_biases_are_spread_by_distance():
    """[n,q,u] is the bias for distance u − q, from −2…3 (columns 0…5) for three queries and four keys."""
    spread = bias_of_rows(jnp.arange(12.0).reshape(2, 6), 3)
    np.testing.assert_array_equal(spread[0], [[2, 3, 4, 5], [1, 2, 3, 4], [0, 1, 2, 3]])
    np.testing.assert_array_equal(spread[1], spread[0] + 6)


# --- Values and gradients against loops ------------------------------------------------------------------------------
def _bucket(distance, buckets, most, bidirectional):
    """T5's rule for a single distance."""
    first = 0
    if bidirectional:
        buckets //= 2
        first, distance = (buckets if distance > 0 else 0), abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    return first + min(
        exact + int(math.log(distance / exact) / math.log(most / exact) * (buckets - exact)), buckets - 1
    )


def _norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def _attention(p, x, keys, visible, bias=0.0):
    """softmax of q·k + bias, without 1/√H, over the visible keys [B,T,U]; two query heads read one key head."""
    query = jnp.einsum("btd,dnh->bnth", x, p["query"])
    key, value = (jnp.einsum("bud,dmh->bmuh", keys, p[name]) for name in ("key", "value"))
    repeats = query.shape[1] // key.shape[1]
    key, value = jnp.repeat(key, repeats, axis=1), jnp.repeat(value, repeats, axis=1)
    scores = jnp.where(visible[:, None], query @ key.swapaxes(-1, -2) + bias, -1e30)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return jnp.einsum("bnth,nhd->btd", weights / weights.sum(-1, keepdims=True) @ value, p["out"])


def _bias(table, length, bidirectional):
    """[N,T,T] of T5's rule."""
    buckets = [[_bucket(u - t, 8, 9, bidirectional) for u in range(length)] for t in range(length)]
    return jnp.moveaxis(table[np.array(buckets)], -1, 0)


def _ffn(p, x, real, config):
    """Dense, or Switch's top-1 with the capacity ceil(1.25·S/E) of a row; also the layer's auxiliary loss."""
    if "dense" in p:
        return jax.nn.relu(x @ p["dense"]["up"]) @ p["dense"]["down"], 0.0
    moe, experts = p["moe"], config.moe.num_experts
    logits = x @ moe["router"]["kernel"]
    probs = jnp.exp(logits) / jnp.exp(logits).sum(-1, keepdims=True)
    chosen = (logits == logits.max(-1, keepdims=True)) * real[..., None]
    kept = chosen * (jnp.cumsum(chosen, axis=1) <= math.ceil(1.25 * x.shape[1] / experts))
    hidden = jax.nn.relu(jnp.einsum("btd,edf->ebtf", x, moe["experts"]["up"]))
    y = jnp.einsum("bte,ebtf,efd->btd", kept * probs, hidden, moe["experts"]["down"])
    share, mean = (jnp.sum(a * real[..., None], axis=(0, 1)) / real.sum() for a in (chosen, probs))
    z_loss = jnp.sum(jnp.log(jnp.exp(logits).sum(-1)) ** 2 * real) / real.sum()
    return y, 0.1 * experts * share @ mean + 0.01 * z_loss


def _oracle(config, parameters, batch):
    """The loss of :func:`_loss`, layer by layer."""
    flat = unstack_layers(config, parameters)
    blocks = [{} for _ in layer_kinds(config)]
    for (layer, path), leaf in flat.items():
        if layer >= 0:
            functools.reduce(lambda node, key: node.setdefault(key, {}), path[:-1], blocks[layer])[path[-1]] = leaf
    table, auxiliary, x = flat[-1, ("embedding", "table")], 0.0, {}

    def outside(*path):
        return flat[-1, path]

    segments = {"encoder": batch["encoder_segment_ids"], "decoder": batch["segment_ids"]}
    tokens = {"encoder": batch["encoder_tokens"], "decoder": batch["tokens"]}
    layers = {"encoder": blocks[: config.encoder_layers], "decoder": blocks[config.encoder_layers :]}
    for stack, own in segments.items():
        y, length = table[tokens[stack]], own.shape[1]
        visible = own[:, :, None] == own[:, None]
        if stack == "decoder":
            visible &= np.tri(length, dtype=bool)
        bias = _bias(outside(stack, "relative_bias", "table"), length, stack == "encoder")
        for p in layers[stack]:
            h = _norm(y, p["attention_norm"]["scale"])
            y += _attention(p["attention"], h, h, visible, bias)
            if stack == "decoder":
                h, across = _norm(y, p["cross"]["norm"]["scale"]), own[:, :, None] == segments["encoder"][:, None]
                y += _attention(p["cross"]["attention"], h, x["encoder"], across)
            update, loss = _ffn(p, _norm(y, p["ffn_norm"]["scale"]), own > 0, config)
            y, auxiliary = y + update, auxiliary + loss
        x[stack] = _norm(y, outside(stack, "final_norm", "scale"))
    known = batch["targets"] >= 0
    log_probs = jax.nn.log_softmax(x["decoder"] / math.sqrt(config.d_model) @ table.T)
    rows, columns = np.nonzero(known)
    return -jnp.mean(log_probs[rows, columns, batch["targets"][rows, columns]]) + auxiliary


@pytest.mark.parametrize(
    "changes",
    [{"encoder_layers": 1, "num_layers": 1, "every": 1, "dispatch": "einsum"}, slow_case({})],
    ids=["an MoE layer each", "dense and MoE layers"],
)
def test_values_and_gradients_equal_the_oracle(changes):
    config = tiny_encoder_decoder(**changes)
    _, parameters = _build(config)
    expected, gradients = jax.jit(jax.value_and_grad(lambda p: _oracle(config, p, _batch())))(parameters)
    (loss, (_, _, layers)), ours = _run(config)
    assert (layers.fraction_tokens_dropped > 0).any()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    _assert_trees_close(ours, gradients, rtol=1e-4)
    for path, gradient in jax.tree_util.tree_leaves_with_path(ours):
        assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("encoder_vocab_size", [slow_case(0), 48])
def test_the_embedding_scale_applies_to_both_stacks(encoder_vocab_size):
    """With a separate output matrix, a scale of 4 equals a table four times as large, in the encoder too."""
    layers = {"gate": "none", "encoder_layers": 1, "num_layers": 1}
    plain = tiny_encoder_decoder(**layers, tie_embeddings=False, encoder_vocab_size=encoder_vocab_size)
    scaled = dataclasses.replace(plain, embedding_scale=4.0)
    _, parameters = _build(plain)
    larger = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 4 if "embedding" in (key.key for key in path) else leaf, parameters
    )

    @jax.jit
    def run(parameters, larger):
        cases = ((scaled, parameters), (plain, larger), (plain, parameters))
        rows = {"encoder_tokens": _batch()["encoder_tokens"]}
        models = [nnx.merge(_build(config)[0], variables) for config, variables in cases]
        return [
            (output.encoder_hidden, output.logits) for output in (model(_batch()["tokens"], **rows) for model in models)
        ]

    for name, values in zip(("encoder_hidden", "logits"), zip(*run(parameters, larger), strict=True), strict=True):
        ours, expected, unscaled = map(np.asarray, values)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.abs(ours - unscaled).max() > 0.1, name


# --- Meshes, scan, remat ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sizes", "mode"),
    [((2, 2, 2, 1), "gather"), ((1, 1, 4, 2), "einsum"), ((1, 2, 2, 2), "dropless")],
    ids=str,
)
@pytest.mark.slow
def test_no_mesh_changes_loss_gradients_or_reports(sizes, mode):
    config = tiny_encoder_decoder(dispatch=mode, num_kv_heads=4)
    graphdef, parameters = _build(config)
    mesh = make_mesh(MeshConfig(*sizes))
    specs = parameter_specs(nnx.state(abstract_model(config)))
    with jax.set_mesh(mesh):
        lie = partition_specs.shardings(mesh, specs)
        placed = jax.tree.map(jax.device_put, parameters, lie)
        batch = jax.device_put(_batch(), partition_specs.shardings(mesh, partition_specs.BATCH))
        run = jax.value_and_grad(functools.partial(_loss, graphdef), has_aux=True)
        ours = jax.jit(run, out_shardings=(None, lie))(placed, batch, jax.random.key(0))
    _assert_trees_close(jax.tree.map(np.asarray, ours), _run(config), rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"scan_layers": False}, {"remat": "dots"}, {"remat": "full"}], ids=str)
def test_scan_and_remat_change_nothing(changes):
    """With noise: the backward pass draws the same dropout and jitter again."""
    config = tiny_encoder_decoder(dropout=0.2, jitter=0.1)
    _assert_trees_close(_run(dataclasses.replace(config, **changes)), _run(config), rtol=2e-5)


@pytest.mark.slow
def test_blocked_attention_changes_nothing():
    _assert_trees_close(_run(tiny_encoder_decoder(attention="blocked")), _run(tiny_encoder_decoder()), rtol=2e-5)


# --- Dropout ---------------------------------------------------------------------------------------------------------
def test_dropout_applies_only_in_training():
    config = tiny_encoder_decoder(gate="none", dropout=0.5, encoder_layers=1, num_layers=1)
    graphdef, parameters = _build(config)
    model = nnx.merge(graphdef, parameters)
    inputs = {name: _batch()[name] for name in ("encoder_tokens", "encoder_segment_ids")}

    @jax.jit
    def run(rng, train=True):
        return model(_batch()["tokens"], train=train, rng=rng, **inputs).logits

    first, second = run(jax.random.key(0)), run(jax.random.key(1))
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_array_equal(first, run(jax.random.key(0)))
    without = nnx.merge(_build(dataclasses.replace(config, dropout=0.0))[0], parameters)
    key = jax.random.key(0)
    evaluated, expected = jax.jit(
        lambda tokens: (model(tokens, rng=key, **inputs).logits, without(tokens, **inputs).logits)
    )(_batch()["tokens"])
    np.testing.assert_allclose(evaluated, expected, rtol=1e-6)


def test_all_layers_of_both_stacks_draw_different_noise():
    model, key = abstract_model(tiny_encoder_decoder(relative_buckets=0)), jax.random.key(0)
    rows, keys = make_rows(np.zeros((1, 4), np.int32), None, None), []
    for stack in (model.encoder, model.decoder):
        run = Call(rows, train=True, rng=key)
        body = stack.body(run)
        block = mock.Mock(spec=Block, side_effect=lambda stream, call: (call.rng, Report()))
        flow = Flow(jnp.zeros(()), {})
        keys += [body(block, flow, None, jnp.asarray(layer))[0].stream for layer in range(len(stack.kinds))]
        keys.append(stack.outer_dropout(run).rng)
    # Three layers and two, and in each stack the dropout outside its layers.
    assert len({tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}) == len(keys) == 7


# --- Padding and documents -------------------------------------------------------------------------------------------
def test_padding_and_other_documents_change_nothing():
    """A document's logits and the auxiliary losses do not change with the tokens of padding; logits of document 1 do
    not change with document 2, in source or target."""
    config = tiny_encoder_decoder(eval_capacity_factor=4.0, encoder_layers=2, dispatch="einsum")  # nothing is dropped
    graphdef, parameters = _build(config)
    batch = _batch()

    @jax.jit
    def run(tokens, encoder_tokens):
        encoder = {name: batch[name] for name in ("encoder_segment_ids", "encoder_positions")}
        model = nnx.merge(graphdef, parameters)
        return model(tokens, batch["segment_ids"], batch["positions"], encoder_tokens=encoder_tokens, **encoder)

    tokens, encoder_tokens = batch["tokens"], batch["encoder_tokens"]
    before = run(tokens, encoder_tokens)

    def changed(document):
        mine, theirs = batch["segment_ids"] == document, batch["encoder_segment_ids"] == document
        return run(np.where(mine, 47 - tokens, tokens), np.where(theirs, 47 - encoder_tokens, encoder_tokens))

    padding, second = changed(0), changed(2)
    real = batch["segment_ids"] > 0
    np.testing.assert_array_equal(padding.logits[real], before.logits[real])
    _assert_trees_close(padding.layers, before.layers)
    first = batch["segment_ids"] == 1
    np.testing.assert_allclose(second.logits[first], before.logits[first], rtol=1e-5, atol=1e-5)
    assert np.abs(second.logits[~first & real] - before.logits[~first & real]).max() > 0.1


@pytest.mark.slow
def test_padding_can_be_routed():
    """Two real tokens and eight of padding choose the same expert, which takes three: padding comes first."""
    config = tiny_encoder_decoder(
        route_padding=True, expert_capacity=3, num_experts=2, every=1, num_layers=1, encoder_layers=1
    )
    graphdef, parameters = _build(config)
    model = nnx.merge(graphdef, parameters)
    mask = np.arange(U)[None] >= U - 2
    same = np.zeros((1, U), np.int32)
    output = model(same[:, :T], encoder_tokens=same, encoder_mask=mask, return_routing=True)
    assert output.routing[0].chosen.all()
    assert output.layers.fraction_tokens_dropped[0] == pytest.approx(7 / 10)
    moe = dataclasses.replace(config.moe, route_padding=False)
    ignored = nnx.merge(_build(dataclasses.replace(config, moe=moe))[0], parameters)
    output = ignored(same[:, :T], encoder_tokens=same, encoder_mask=mask, return_routing=True)
    assert output.routing[0].chosen.sum() == 2
    assert output.layers.fraction_tokens_dropped[0] == 0


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_an_encoders_row_does_not_depend_on_the_length_of_others(kind):
    """A source of 2 tokens, within the original context of 3, by itself and beside one of 5, which exceeds it."""
    factors = {"short_factors": (1.0, 2.0, 3.0), "long_factors": (4.0, 5.0, 6.0)} if kind == "longrope" else {}
    scaling = RopeScalingConfig(kind=kind, factor=4.0, original_length=3, **factors)
    sizes = {"encoder_layers": 1, "num_layers": 1, "gate": "none", "every": 1}
    config = tiny_encoder_decoder(**sizes, relative_buckets=0, rope_scaling=scaling)
    graphdef, parameters = _build(config)
    encode = jax.jit(lambda tokens, lengths: kv_cache.encode(nnx.merge(graphdef, parameters), tokens, lengths).layers)
    together = encode(jnp.asarray([[8, 2, 0, 0, 0], [5, 3, 9, 1, 7]]), jnp.asarray([2, 5]))
    alone = encode(jnp.asarray([[8, 2]]), jnp.asarray([2]))
    for both, one in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(both[:, 0, :2], one[:, 0], rtol=1e-4, atol=1e-5)


# --- Generation ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [{}, {"relative_buckets": 0, "tie_embeddings": False, "scale_logits": False}],
    ids=str,
)
@pytest.mark.slow
def test_a_cache_generates_what_recomputation_does(changes):
    config = sampling.without_drops(tiny_encoder_decoder(**changes))
    graphdef, parameters = _build(config)
    sources = [[5, 3, 9, 1, 7], [8, 2]]
    written = sampling.sample(config, parameters, sources, 5, sampling.Sampling(temperature=0, start_token=3))
    padded, mask = np.zeros((2, 5), np.int32), np.zeros((2, 5), bool)
    for row, source in enumerate(sources):
        padded[row, : len(source)], mask[row, : len(source)] = source, True
    model = nnx.merge(graphdef, parameters)
    run = jax.jit(lambda tokens: model(tokens, encoder_tokens=padded, encoder_mask=mask).logits)
    texts = np.full((2, 6), 3, np.int32)
    for i in range(5):
        texts[:, i + 1] = np.argmax(run(texts)[:, i], axis=-1)
    np.testing.assert_array_equal(written, texts[:, 1:])
    # Logits of each step too, not only the likeliest token.
    lengths = mask.sum(1).astype(np.int32)
    encoded = kv_cache.encode(model, jnp.asarray(padded), jnp.asarray(lengths))
    caches = kv_cache.empty(config, 2, 6)
    two = jnp.asarray([2, 2])
    x, caches, _ = kv_cache.run_prompt(model, jnp.asarray(texts[:, :2]), two, caches, encoded)
    np.testing.assert_allclose(kv_cache.prompt_logits(model, x, two), run(texts)[:, 1], rtol=1e-4, atol=1e-5)
    x, _, _ = kv_cache.extend(model, jnp.asarray(texts[:, 2:3]), two[:, None], jnp.ones(2, bool), caches, encoded)
    np.testing.assert_allclose(kv_cache.next_logits(model, x), run(texts)[:, 2], rtol=1e-4, atol=1e-5)
