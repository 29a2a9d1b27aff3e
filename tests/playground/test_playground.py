"""The page in a headless browser: experts, weights, drops and losses equal Python's; text, keys and refusals."""

import dataclasses
import json
import re
import types
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from moe.analysis import surgery
from moe.config import Config, ConfigError, DataConfig, MeshConfig, TrainConfig
from moe.data.tokenizer import train_tokenizer
from moe.dispatch.buffers import layer_capacity, make_plan
from moe.layers.router import SelectionBias
from moe.models import sampling
from moe.models.state import join
from moe.parallel.mesh import make_mesh
from moe.playground import packed as weights
from moe.playground import page
from moe.playground.supported import vocabulary
from moe.routing.gates import DenseMixture, ExpertChoice, Hash, TopK
from moe.system import shipped
from moe.training.batches import forward
from moe.training.losses import token_cross_entropy
from moe.training.step import build
from tests.browser import needs_browser, run
from tests.helpers import random_parameters, tiny_model

COMMITTED = shipped.PLAYGROUND
TEXTS = (
    "The cat sat on the mat, and the dog slept beside it until the rain began to fall on the roof.",
    "def add(a, b):\n    return a + b  # the sum of two numbers, or of two lists, or of two strings",
    "Specifies the Amazon Resource Name (ARN) of the role that the service assumes on your behalf.",
    "dog, domestic dog (noun): a member of the genus Canis that has been domesticated by man",
    "naïve façade — 東京 🙂 is text that the model has seldom seen, or never at all",
)
TOKENS = 24  # of every row that is compared


def pack(model, **header):
    """Pack a model with random parameters, and a vocabulary of six pieces, as the weights of a page."""
    graphdef, variables = random_parameters(model)
    built = nnx.merge(graphdef, variables)
    parts = [nnx.to_pure_dict(nnx.state(built, kind)) for kind in (nnx.Param, SelectionBias)]
    words = {"pieces": ["<unk>", "<s>", "\n", *"abc"], "kinds": "ccunnn", "bos": 1}
    base = {"title": "A <model>", "length": 64, "sizes": "", "about": "", "losses": {}}
    base |= {"examples": [{"name": "abc", "text": "abc"}]}
    arrays = [jax.tree.map(np.asarray, part) for part in parts]
    return weights.pack(model, *arrays, {**base, "vocabulary": words, **header})


# --- Against Python ---
def in_python(model, parameters, biases, rows):
    """Losses [B,T-1], and for every layer, row and token {expert: (weight, kept)}."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    data, train = DataConfig(sequence_length=rows.shape[1]), TrainConfig(batch_size=len(rows))
    program = build(Config(model=dataclasses.replace(model, scan_layers=True), data=data, train=train), mesh)

    @jax.jit
    def compute(variables, batch):
        built = program.model(variables)
        output = forward(built, batch, return_routing=True)
        return token_cross_entropy(output.hidden, built.output_matrix(), batch["targets"]), output.routing

    where = np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape)
    targets = np.concatenate([rows[:, 1:], np.full((len(rows), 1), -1)], axis=1).astype(np.int32)
    batch = {"tokens": rows, "targets": targets, "positions": where, "segment_ids": np.ones_like(rows)}
    with jax.set_mesh(mesh):
        losses, routing = compute(join(parameters, biases), batch)
    dropless = model.moe.dispatch == "dropless"
    capacity = rows.size * 100 if dropless else layer_capacity(model.moe, rows.shape[1], train=False)
    layers = []
    for layer in range(routing.expert_index.shape[0]):
        own = jax.tree.map(lambda array, layer=layer: array[layer], routing)
        arrays = own.expert_index, own.combine_weights, own.chosen, make_plan(own, capacity).kept
        layers.append(
            [
                [_assignments(*token) for token in zip(*row, strict=True)]
                for row in zip(*map(np.asarray, arrays), strict=True)
            ]
        )
    return np.asarray(losses)[:, :-1], layers


def _assignments(experts, amounts, chosen, kept):
    found = zip(experts.tolist(), amounts.tolist(), chosen, kept.tolist(), strict=True)
    return {expert: (amount, sent) for expert, amount, sends, sent in found if sends}


def in_browser(text, tmp_path, rows, settings):
    """The page's results for each setting: rule, k, capacity, and the experts that are off in all layers."""
    script = f"""return {json.dumps(settings)}.map(({{ rule, k, capacity, off }}) => {json.dumps(rows.tolist())}.map(
        ids => model.forward(ids, {{ rule: data.rules[rule], k, capacity,
            off: Object.fromEntries(SPARSE.map(layer => [layer, new Set(off)])) }})))"""
    found = run(text, tmp_path, script)
    assert isinstance(found, list), found
    return found


def compare(of_page, of_python, kept_experts, *, ordered=True):
    losses, layers = of_python
    for row, result in enumerate(of_page):
        np.testing.assert_allclose(result["losses"], losses[row], atol=2e-4)
        assert len(result["routing"]) == len(layers)
        for layer, found in enumerate(result["routing"]):
            for token, assignments in enumerate(found["assignments"]):
                expected = {kept_experts[expert]: value for expert, value in layers[layer][row][token].items()}
                got = {each["expert"]: (each["weight"], each["kept"]) for each in assignments}
                assert got.keys() == expected.keys(), (layer, row, token)
                for expert, (amount, sent) in expected.items():
                    assert got[expert] == (pytest.approx(amount, abs=2e-5), sent), (layer, row, token)
                if ordered:  # first choice first
                    assert [each["expert"] for each in assignments] == list(expected)


#: Rule of the page (its number), K, capacity factor, experts that are off; and the gate in Python.
SETTINGS = (
    ({"rule": 0, "k": 2, "capacity": 0, "off": []}, TopK(k=2, renormalise=True)),
    ({"rule": 1, "k": 3, "capacity": 0.75, "off": [1, 6]}, TopK(k=3, renormalise=True)),
    ({"rule": 2, "k": 1, "capacity": 1.0, "off": []}, TopK(k=1)),
    ({"rule": 3, "k": 2, "capacity": 0, "off": [0]}, TopK(k=2, score="sigmoid", renormalise=True)),
    ({"rule": 4, "k": 2, "capacity": 1.25, "off": []}, ExpertChoice(k=2)),
    ({"rule": 5, "k": 2, "capacity": 0, "off": []}, DenseMixture()),
    ({"rule": 6, "k": 2, "capacity": 1.0, "off": [3]}, Hash(k=2)),
)


@pytest.mark.slow
@needs_browser
def test_the_committed_page_computes_what_python_does(tmp_path):
    packed = weights.read(COMMITTED)
    text = page.render(packed)
    assert len(text) < page.LARGEST
    assert not re.search("https?://|src=|href=|@import|url\\(", text.partition('<script type="application/json"')[0])
    ids = run(text, tmp_path, f"return {json.dumps(TEXTS)}.map(text => [tokenizer.bos, ...tokenizer.encode(text)])")
    assert min(map(len, ids)) >= TOKENS
    rows = np.array([row[:TOKENS] for row in ids], np.int32)
    found = in_browser(text, tmp_path, rows, [settings for settings, _ in SETTINGS])
    parameters, biases = weights.unpack(packed)
    for (settings, gate), of_page in zip(SETTINGS, found, strict=True):
        kept = [expert for expert in range(packed.model.moe.num_experts) if expert not in settings["off"]]
        layers = len(of_page[0]["routing"])
        model, fewer, _ = surgery.prune(packed.model, parameters, biases, np.tile(kept, (layers, 1)))
        capacity = settings["capacity"]
        moe = {"gate": gate, "dispatch": "gather" if capacity else "dropless", "losses": type(model.moe.losses)()}
        if capacity:
            moe["capacity"] = dataclasses.replace(model.moe.capacity, eval=capacity)
        moe = dataclasses.replace(model.moe, **moe, accept_future_leak=True)
        if gate.router == "none":
            fewer = _without_routers(fewer)
        found_there = in_python(dataclasses.replace(model, moe=moe), fewer, {}, rows)
        compare(of_page, found_there, kept, ordered=not gate.lists_all)


def _without_routers(tree):
    return {
        name: _without_routers(value) if isinstance(value, dict) else value
        for name, value in tree.items()
        if name != "router"
    }


def test_int8_hardly_changes_the_committed_losses():
    packed = weights.read(COMMITTED)
    losses = packed.header["losses"]
    assert abs(losses["int8"]["all"] - losses["float32"]["all"]) < 0.01
    assert f"{losses['int8']['all']:.3f} nats per token" in packed.header["about"]


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(
    "overrides",
    [
        {"gate": "deepseek_v4", "experts_per_token": 2, "shared_d_ff": 12, "first_dense": 1, "activation": "geglu"},
        {"gate": "switch", "activation": "relu", "tie_embeddings": True, "scale_logits": True, "every": 2},
        {"gate": "deepseek_moe", "experts_per_token": 3, "activation": "reglu", "residual_scale": 0.5},
        {"gate": "mixtral", "activation": "gelu", "embedding_scale": 3.0, "attention_scale": 0.3, "logit_scale": 0.5},
    ],
    ids=lambda overrides: overrides["gate"],
)
def test_other_models_of_a_run(tmp_path, rng, overrides):
    packed = pack(tiny_model(dispatch="dropless", num_layers=3, **overrides))
    rows = rng.integers(0, 48, (2, 11)).astype(np.int32)
    settings = {"rule": 0, "k": packed.model.moe.experts_per_token, "capacity": 0, "off": []}
    found = in_browser(page.render(packed), tmp_path, rows, [settings])
    compare(found[0], in_python(packed.model, *weights.unpack(packed), rows), range(4))


@pytest.mark.slow
@needs_browser
def test_a_text_has_its_pool_and_is_continued_in_it(tmp_path, rng):
    """EMO: a text has one pool as a document and as a prompt, so the likeliest token is generation's."""
    packed = pack(tiny_model(gate={"name": "emo", "k": 2, "pool": 0.6}, dispatch="dropless", accept_future_leak=True))
    parameters, biases = weights.unpack(packed)
    rows = rng.integers(0, 48, (4, 11)).astype(np.int32)
    settings = [{"rule": 0, "k": 2, "capacity": 0, "off": off} for off in ([], [1])]
    found = in_browser(page.render(packed), tmp_path, rows, settings)
    compare(found[0], in_python(packed.model, parameters, biases, rows), range(4))
    pools = [[layer["pool"] for layer in result["routing"]] for result in found[0]]
    assert all(len(pool) == 3 for layers in pools for pool in layers)  # ceil(0.6 · 4)
    assert len({str(layers) for layers in pools}) > 1
    model, fewer, _ = surgery.prune(packed.model, parameters, biases, np.tile([0, 2, 3], (2, 1)))
    compare(found[1], in_python(model, fewer, {}, rows), [0, 2, 3])  # ceil(0.6 · 3) = 2 of three experts
    texts = sampling.sample(packed.model, join(parameters, biases), list(rows), 1, sampling.Sampling(temperature=0))
    assert [result["next"][0]["id"] for result in found[0]] == [int(text[0]) for text in texts]


def test_int8_rounding_and_the_round_trip_by_hand(tmp_path):
    """Rows (127, -63.6) and (0, 0): scales 1 and about 0, integers (127, -64) and (0, 0)."""
    model = tiny_model(dispatch="dropless")
    packed = pack(model)
    weights.write(tmp_path / "page.npz", packed)
    again = weights.read(tmp_path / "page.npz")
    assert (again.model, again.header) == (packed.model, json.loads(json.dumps(packed.header)))
    parameters, _ = weights.unpack(again)
    original = nnx.to_pure_dict(nnx.state(nnx.merge(*random_parameters(model)), nnx.Param))
    for array, before in zip(jax.tree.leaves(parameters), jax.tree.leaves(original), strict=True):
        assert array.shape == before.shape
        np.testing.assert_allclose(array, before, atol=float(np.abs(before).max()) / 127 * 0.5001)
    original["embedding"]["table"] = np.zeros((48, 16), np.float32)
    original["embedding"]["table"][1, :2] = 127, -63.6
    rounded = weights.pack(model, original, {}, packed.header).arrays
    assert rounded["embedding"][1, :2].tolist() == [127, -64]
    assert rounded["embedding.scales"][1] == 1
    assert not rounded["embedding"][0].any()


def _header(**fields):
    return lambda packed: packed.header.update(fields)


def _array(name, edit):
    return lambda packed: packed.arrays.update({name: edit(packed.arrays[name])})


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda packed: packed.header.pop("title"), "header: has no title"),
        (_header(title=3), "header: title=3: must be a string"),
        (_header(length=10**9), "header: length=1000000000: must be less"),
        (_header(about=None), "header: about=None"),
        (_header(examples=[{"name": "x"}]), "header: has no examples.0.text"),
        (_header(losses={"int8": {"all": float("nan")}}), "header: losses.int8.all=nan"),
        (_header(vocabulary={"pieces": ["a"], "kinds": "nn", "bos": 0}), "header: vocabulary=.*a kind for each piece"),
        (
            _header(vocabulary={"pieces": ["a"] * 49, "kinds": "n" * 49, "bos": 0}),
            "more than model.vocab_size=48 pieces",
        ),
        (lambda packed: packed.header["model"].update(d_model=17), "embedding must be finite int8 of shape"),
        (lambda packed: packed.header["model"].update(evil=1), "header: model.evil: no such field"),
        (lambda packed: packed.header["model"]["moe"].update(gate="this:x"), "header: .*'this:x' is code of a module"),
        (lambda packed: packed.arrays.pop("embedding"), "npz: embedding is missing"),
        (_header(model={}), "header: model|page supports|is not an array of its model|is missing"),
        (lambda packed: packed.arrays.update(evil=np.ones(2)), "npz: evil is not an array of its model"),
        (_array("embedding", lambda array: array.astype(np.float32)), "embedding must be finite int8 of shape"),
        (_array("embedding.scales", lambda array: array * np.nan), "embedding.scales must be finite float32"),
        (_array("final_norm", lambda array: array[0]), r"final_norm must be finite float32 of shape \[1, 16\]"),
    ],
)
def test_malformed_files_are_refused(tmp_path, edit, says):
    packed = pack(tiny_model(dispatch="dropless"))
    packed = weights.Packed(json.loads(json.dumps(packed.header)), dict(packed.arrays))
    edit(packed)
    weights.write(tmp_path / "page.npz", packed)
    with pytest.raises(ConfigError, match=says):
        weights.read(tmp_path / "page.npz")


# --- Text ---
ODD = (
    *TEXTS, " ", "   \n\n\t x  ", "\n", "a\nb\n", "ends with space ", "▁ is SentencePiece's space", "<s> </s> <0x41>",
    "e\u0301 \u200b\ufeff", "👩‍👩‍👧‍👦", "\x00\x7f", "AAAA" * 40, "\r\n", "𝒳 ½", "aaaaaaaaa the the  the   the",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat while   it was raining\n    aa aaa\n" * 3, *TEXTS] * 4, 420)


@pytest.mark.slow
@needs_browser
def test_tokens_equal_those_of_sentencepiece(tmp_path, tokenizer):
    text = page.render(pack(tiny_model(dispatch="dropless", vocab_size=420), vocabulary=vocabulary(tokenizer)))
    found = run(text, tmp_path, f"return {json.dumps(ODD)}.map(text => tokenizer.encode(text))")
    assert found == [tokenizer.encode(odd).tolist() for odd in ODD]


def test_unsupported_tokenizers_are_refused(tokenizer):
    from sentencepiece import sentencepiece_model_pb2 as schema

    assert vocabulary(tokenizer)["kinds"][:5] == "cccc" + "u"
    for section, field, value in (
        ("trainer_spec", "model_type", 1),
        ("trainer_spec", "byte_fallback", False),
        ("normalizer_spec", "name", "nmt_nfkc"),
        ("normalizer_spec", "add_dummy_prefix", True),
    ):
        changed = schema.ModelProto.FromString(tokenizer.model_bytes)
        setattr(getattr(changed, section), field, value)
        other: Any = types.SimpleNamespace(model_bytes=changed.SerializeToString(), bos_id=1)
        with pytest.raises(ConfigError, match="the page reads SentencePiece BPE"):
            vocabulary(other)


# --- Controls ---
@pytest.mark.slow
@needs_browser
def test_controls_keys_and_messages_of_the_page(tmp_path):
    text = page.render(pack(tiny_model(dispatch="dropless")))
    found = run(
        text,
        tmp_path,
        """
        const texts = selector => [...document.querySelectorAll(selector)].map(node => node.textContent);
        const set = (id, value) => { byId(id).value = value; byId(id).dispatchEvent(new Event("input")); };
        const key = name => document.activeElement.dispatchEvent(
          new KeyboardEvent("keydown", { key: name, bubbles: true }));
        const found = { title: document.title, heading: texts("h1"), tokens: texts("#layers .tokens")[0] };
        found.unlabelled = [...document.querySelectorAll("textarea, select, input")].filter(
          node => !node.labels.length).length;
        found.stops = document.querySelectorAll("#layers .token[tabindex='0']").length;
        document.querySelector("#layers .token[tabindex='0']").focus();
        key("ArrowRight"); key("ArrowDown"); key("End"); key("Home"); key("ArrowRight");
        found.place = document.activeElement.place;
        found.still = document.querySelectorAll("#layers .token[tabindex='0']").length;
        found.token = texts("#token p")[0];
        found.weights = texts("#token tr").length;
        found.before = texts("#loss")[0];
        const button = byId("experts").rows[1].querySelectorAll("button")[2];
        button.click();
        found.pressed = [button.getAttribute("aria-pressed"), button.getAttribute("aria-label")];
        found.off = state.result.routing.map(
          ({ assignments }) => assignments.flat().some(({ expert }) => expert === 2));
        for (const other of byId("experts").rows[2].querySelectorAll("button")) other.click();
        found.left = state.settings.off[1].size;
        byId("reset").click();
        found.reset = [texts("#loss")[0], texts("#change")[0]];
        set("k", "4");
        found.k = [texts("#k-value")[0], state.result.routing[0].assignments[0].length];
        set("capacity", "0.5");
        found.dropped = [texts("#dropped")[0], document.querySelectorAll("#layers .token.lost").length > 0];
        found.example = texts("#capacity-example")[0];
        set("capacity", "4");
        found.most = texts("#capacity-example")[0];
        set("k", "2"); set("rule", "5"); set("capacity", "0.5");
        found.disabled = byId("k").disabled;
        found.dense = texts("#capacity-example")[0];
        set("rule", "0"); set("k", "4"); set("capacity", "0");
        byId("experts").rows[0].querySelectorAll("button")[3].click();
        found.fewer = texts("#capacity-example")[0];
        byId("text").value = "a".repeat(64); readText();
        found.long = [texts("#message")[0], texts("#loss")[0], texts("#layers")[0]];
        byId("text").value = "a".repeat(1000000); readText();
        found.longer = texts("#message")[0];
        byId("text").value = ""; readText();
        found.empty = texts("#message")[0];
        byId("text").value = "<b>abc</b>".replace(/[^abc]/g, ""); readText();
        document.querySelectorAll("#examples button")[0].click();
        found.examples = byId("text").value;
        document.documentElement.style.width = "420px";
        found.width = Math.max(...[...document.body.querySelectorAll("*")].filter(
          node => !node.closest(".scroll")).map(node => node.getBoundingClientRect().right));
        return found;
        """,
        width=500,
    )
    assert isinstance(found, dict), found
    assert (found["title"], found["heading"]) == ("A <model>", ["A <model>"])
    assert [c for c in found["tokens"] if c in "abc"] == ["a", "b", "c"]
    assert (found["unlabelled"], found["stops"], found["still"]) == (0, 1, 1)
    assert found["place"] == [1, 1]
    assert found["token"].startswith('"a", token 1, id 3: loss ')
    assert found["weights"] == 2
    assert found["pressed"][0] == "true"
    assert found["pressed"][1].startswith("switch expert 2 off in layer 0, ")
    assert found["off"][0] is False
    assert found["left"] == 3  # of 4: one always stays
    assert found["reset"] == [found["before"], ""]
    assert found["k"] == ["4", 4]
    assert found["dropped"] == ["16", True]  # C = ceil(0.5 * 4 * 4 / 4) = 2 of each expert's 4, in 2 layers
    assert found["example"] == "Here C = ceil(0.5 · 4 · 4 / 4) = 2."
    assert found["most"] == "Here C = min(4, ceil(4 · 4 · 4 / 4)) = 4."
    assert found["disabled"] is True
    assert found["dense"] == "Here C = ceil(0.5 · 4 · 4 / 4) = 2."  # all four experts, not the two of the slider
    assert found["fewer"] == "Here, with a factor of 1, C would be ceil(3 · 4 / 3) = 4."  # three are on
    assert found["long"] == ["The text has 64 tokens; the model reads at most 63 tokens. Shorten it.", "–", ""]
    assert found["longer"] == "The text has 1,000,000 characters; the model reads at most 63 tokens. Shorten it."
    assert found["empty"] == "Type some text, or take an example."
    assert found["examples"] == "abc"
    assert found["width"] <= 420


# --- Titles and sizes ---
def test_surrogates_in_a_title_are_escaped():
    assert "<title>\\ud800" in page.render(pack(tiny_model(dispatch="dropless"), title="\ud800"))


def test_a_page_with_too_many_parameters_is_refused(monkeypatch):
    monkeypatch.setattr(page, "LARGEST", 10_000)
    with pytest.raises(ConfigError, match=r"the page would have 0\.\d MB; at most 0 MB are allowed"):
        page.render(pack(tiny_model(dispatch="dropless")))
