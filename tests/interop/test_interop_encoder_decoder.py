"""T5 and Switch checkpoints: values equal Hugging Face transformers', exports equal imports, pickles are refused.

tests/data holds a T5 with an untied output matrix and a deeper decoder, and a Switch whose MoE layers are at different
positions in the two stacks, with left padding and dropped tokens; ../shared/parity holds more.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from moe.config import Capacity, Config, ConfigError, sparse_layers
from moe.interop import export_checkpoint, import_checkpoint, load_huggingface, save_huggingface
from moe.interop.balance import switch_losses
from moe.interop.config_json import read_config, write_config
from moe.layers.call import Report
from moe.models import sampling
from moe.system.sealed_folder import unsealed
from moe.training.losses import cross_entropy
from tests.helpers import slow_case, tiny_model

HERE = Path(__file__).parents[1] / "data" / "checkpoints"
SHARED = Path(__file__).parents[2].parent / "shared" / "parity"
PATHS = [
    *(HERE / name for name in ("t5", "switch_transformers")),
    *(SHARED / name for name in ("t5", "t5_v1_1", "switch", "switch_capacity")),
]
CASES = [pytest.param(path, id=f"{path.parent.name}-{path.name}") for path in PATHS]
#: The references of ../shared are of families that tests/data covers too.
SOME = [*CASES[:2], *(slow_case(*case.values, id=case.id) for case in CASES[2:])]


def _expected(path):
    if not path.exists():
        pytest.skip(f"no reference models at {path}")
    with np.load(path / "expected.npz") as file:
        return dict(file)


def _assert_close(ours, theirs):
    assert np.abs(np.asarray(ours, np.float64) - theirs).max() < 2e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("path", SOME)
def test_parity(path):
    expected = _expected(path)
    model, config = load_huggingface(path)

    @jax.jit
    def run(decoder_tokens):
        mask = expected["attention_mask"]
        output = model(decoder_tokens, encoder_tokens=expected["input_ids"], encoder_mask=mask, return_routing=True)
        return dataclasses.replace(output, report=Report())  # which nothing here reads

    output = jax.device_get(run(expected["decoder_input_ids"]))
    known = expected["labels"] >= 0
    _assert_close(output.logits[known], expected["logits"][known])
    _assert_close(output.encoder_hidden, expected["encoder_output"])
    nll, count = jax.jit(cross_entropy)(output.logits, expected["labels"])
    loss = nll / count
    if any(sparse_layers(config.model)):
        source = json.loads((path / "config.json").read_text())
        for stack, routing in zip(("encoder", "decoder"), output.routing, strict=True):
            for layer, logits in enumerate(routing.router_logits):
                _assert_close(logits, expected[f"{stack}_router_logits_{layer}"])
            z_loss, balance_loss = jax.jit(switch_losses)(routing)
            np.testing.assert_allclose(z_loss, expected[f"{stack}_z_loss"], rtol=1e-5)
            np.testing.assert_allclose(balance_loss, expected[f"{stack}_aux_loss"], rtol=1e-5)
            loss += source["router_z_loss_coef"] * z_loss + source["router_aux_loss_coef"] * balance_loss
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)

    texts = np.zeros_like(expected["greedy"])
    inputs = np.zeros_like(expected["decoder_input_ids"])
    for i in range(texts.shape[1] - 1):
        inputs[:, : texts.shape[1]] = texts[:, : inputs.shape[1]]
        texts[:, i + 1] = np.argmax(np.asarray(run(inputs).logits)[:, i], axis=-1)
    np.testing.assert_array_equal(texts, expected["greedy"])


@pytest.mark.parametrize("path", [CASES[2], *(slow_case(*case.values, id=case.id) for case in CASES[3:5])])
def test_generation_with_a_cache_equals_generation_without(path):
    """For decoders that drop nothing; left padding is removed, since a cache cannot hold it."""
    expected = _expected(path)
    model, config = load_huggingface(path)
    sources = [row[mask > 0] for row, mask in zip(expected["input_ids"], expected["attention_mask"], strict=True)]
    variables = nnx.to_pure_dict(nnx.state(model))
    texts = sampling.sample(config.model, variables, sources, 10, sampling.Sampling(temperature=0))
    np.testing.assert_array_equal(texts, expected["greedy"][:, 1:])


@pytest.mark.parametrize("path", [CASES[0], slow_case(*CASES[1].values, id=CASES[1].id)])
def test_an_export_equals_its_import(path, tmp_path):
    source = json.loads((path / "config.json").read_text())
    model, config = load_huggingface(path)
    save_huggingface(model, config, tmp_path / "model", source=source)
    import_checkpoint(path, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "exported")
    for folder in (tmp_path / "model", tmp_path / "exported"):
        jax.tree.map(
            np.testing.assert_array_equal,
            load_file(folder / "model.safetensors"),
            load_file(path / "model.safetensors"),
        )
        written = json.loads((folder / "config.json").read_text())
        # The T5 of transformers writes tie_word_embeddings=True for an untied output matrix too.
        kept = source.keys() - {"dtype", "tie_word_embeddings"}
        assert {name: written.get(name) for name in kept} == {name: source[name] for name in kept}


def test_layer_patterns_of_a_model_trained_here_are_exported_or_refused():
    """MoE layers 1, 2, 3 of 4 in the encoder, or 0 and 2, are refused: no sparse step of transformers selects them."""
    switch = {"gate": "switch", "every": 2, "encoder_layers": 4, "num_layers": 3, "num_kv_heads": 4, "moe_d_ff": 28}
    t5 = {"relative_buckets": 8, "relative_max_distance": 20, "tie_embeddings": True, "scale_logits": True}
    settings = {**switch, **t5, "activation": "relu"}
    written = write_config(Config(model=tiny_model(**settings)))
    assert written["model_type"] == "switch_transformers"
    assert (written["encoder_sparse_step"], written["num_sparse_encoder_layers"]) == (2, 2)
    assert (written["decoder_sparse_step"], written["num_sparse_decoder_layers"]) == (3, 1)  # any step from 2 on
    assert "hidden_size" not in written
    assert sparse_layers(read_config(written).model) == (False, True, False, True, False, True, False)
    dense = write_config(Config(model=tiny_model(**{**settings, "gate": "none", "activation": "geglu"})))
    assert (dense["model_type"], dense["feed_forward_proj"]) == ("t5", "gated-gelu")
    for layers in ((1, 2, 3), (0, 2)):
        with pytest.raises(ConfigError, match="no open architecture"):
            write_config(Config(model=tiny_model(**{**settings, "every": 1, "layers": layers})))


def test_balance_coefficients_keep_their_weight():
    """Each of two stacks has a mean over its layers that is 1 at balance: 0.001·2 over 4 layers is 0.0005 each."""
    config = read_config(json.loads((HERE / "switch_transformers" / "config.json").read_text()))
    layers = sum(sparse_layers(config.model))
    assert config.model.moe.losses.balance == pytest.approx(0.001 * 2 / layers)
    assert config.model.moe.losses.z == pytest.approx(0.001 * 2 / layers)


def test_the_first_token_of_a_trained_decoder_is_exported(tmp_path):
    """Decoders trained here begin with padding, whichever id the tokenizer gives it."""
    import_checkpoint(HERE / "switch_transformers", tmp_path / "run")
    for name in ("huggingface_config.json", "generation_config.json"):  # which only an import has
        (tmp_path / "run" / name).unlink()
    config = tmp_path / "run" / "config.json"
    config.write_text(json.dumps(unsealed(config.read_text())))
    text = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "</s>": 2, "<pad>": 3}, unk_token="<unk>"))
    text.save(str(tmp_path / "run" / "tokenizer.json"))
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (tmp_path / "run" / "tokenizer_config.json").write_text(json.dumps(names))
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["decoder_start_token_id"] == 3


def test_pickles_are_refused_with_a_remedy(tmp_path):
    shutil.copy(HERE / "t5" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ConfigError, match=r"\*\.bin.*convert them once with transformers.*save_pretrained"):
        load_huggingface(tmp_path)


def test_untied_stacks_have_separate_tables(tmp_path):
    """Switch without tied embeddings, as transformers 5.24 stores it; of two equal tables one is kept."""
    source = json.loads((HERE / "switch_transformers" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(source | {"tie_word_embeddings": False}))
    tensors = load_file(HERE / "switch_transformers" / "model.safetensors")
    table = tensors["shared.weight"]
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    tensors |= {"lm_head.weight": table + 1, names[0]: table + 2, names[1]: table + 3}
    save_file(tensors, tmp_path / "model.safetensors")
    model, config = load_huggingface(tmp_path)
    assert (config.model.encoder_vocab_size, config.model.scale_logits) == (90, False)
    np.testing.assert_array_equal(model.encoder.embedding.table[...], table + 2)
    np.testing.assert_array_equal(model.embedding.table[...], table + 3)
    np.testing.assert_array_equal(model.unembedding.kernel[...], table.T + 1)
    save_huggingface(model, config, tmp_path / "own")
    written = load_file(tmp_path / "own" / "model.safetensors")
    assert written.keys() == tensors.keys()  # shared.weight, which nothing reads, is the decoder's
    for name in (*names, "lm_head.weight"):
        np.testing.assert_array_equal(written[name], tensors[name])
    assert load_huggingface(tmp_path / "own")[1].model == config.model

    save_file(tensors | dict.fromkeys(names, table), tmp_path / "model.safetensors")
    model, config = load_huggingface(tmp_path)
    assert config.model.encoder_vocab_size == 0
    save_huggingface(model, config, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    np.testing.assert_array_equal(written[names[0]], table)


@pytest.mark.slow
def test_a_router_bias_is_read(tmp_path):
    source = json.loads((HERE / "switch_transformers" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(source | {"router_bias": True}))
    tensors = load_file(HERE / "switch_transformers" / "model.safetensors")
    routers = [name for name in tensors if name.endswith("router.classifier.weight")]
    biases = {name.replace("weight", "bias"): np.arange(5, dtype=np.float32) for name in routers}
    save_file(tensors | biases, tmp_path / "model.safetensors")
    model, config = load_huggingface(tmp_path)
    assert config.model.moe.bias == "router"
    output = model(np.ones((1, 3), int), encoder_tokens=np.ones((1, 4), int), return_routing=True)
    without, _ = load_huggingface(HERE / "switch_transformers")
    plain = without(np.ones((1, 3), int), encoder_tokens=np.ones((1, 4), int), return_routing=True)
    first, other = (out.routing[0].router_logits[0] for out in (output, plain))
    np.testing.assert_allclose(first - other, np.broadcast_to(np.arange(5), first.shape), atol=1e-4)
    save_huggingface(model, config, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys() | biases.keys()


def test_copies_of_the_embedding_must_equal_it(tmp_path):
    shutil.copytree(HERE / "switch_transformers", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    copies = {f"{stack}.embed_tokens.weight": tensors["shared.weight"] for stack in ("encoder", "decoder")}
    save_file(tensors | copies, path)
    load_huggingface(tmp_path / "model")
    save_file(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"] + 1}, path)
    with pytest.raises(ConfigError, match=r"encoder\.embed_tokens\.weight: differs from shared\.weight"):
        load_huggingface(tmp_path / "model")


def test_a_router_in_bfloat16_is_not_exported():
    """transformers would round the softmax and the weights too."""
    config = read_config(json.loads((HERE / "switch_transformers" / "config.json").read_text()))
    moe = dataclasses.replace(config.model.moe, router_dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"router_dtype='bfloat16': must be 'float32'"):
        write_config(
            dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe)), "switch_transformers"
        )


@pytest.mark.parametrize(
    "changes", [{"group_size": 4}, {"overflow_to_next": True}, {"drop_policy": "probability"}, {"route_padding": False}]
)
def test_drop_rules_that_the_format_cannot_express_are_refused(changes):
    """The format drops a row's last tokens beyond the capacity, padding included; other rules give other logits."""
    config = read_config(json.loads((HERE / "switch_transformers" / "config.json").read_text()))
    moe = dataclasses.replace(config.model.moe, capacity=Capacity(fixed=3), dispatch="gather")
    whole = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    assert write_config(whole)["expert_capacity"] == 3
    moe = dataclasses.replace(moe, accept_future_leak=True, **changes)
    other = dataclasses.replace(whole, model=dataclasses.replace(whole.model, moe=moe))
    with pytest.raises(ConfigError, match=rf"switch_transformers lacks model\.moe\.{next(iter(changes))}"):
        write_config(other)
