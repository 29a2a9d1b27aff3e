"""The routing explorer in a headless browser: layers, experts, tooltips, and speed with long texts."""

import json

import numpy as np
import pytest

from moe.analysis.explorer import explorer_page
from moe.analysis.passages import Passage
from tests.browser import needs_browser, run

LAYERS, EXPERTS, STEPS = [1, 3, 5], 4, [50, 100]

pytestmark = [pytest.mark.slow, needs_browser]


def make_page(tokens, num_experts=EXPERTS, choices=2, scale=1.0):
    """A page of two passages: token i of the first one goes to the experts i, i + 1, … mod E in layer 1."""
    pieces = [[" the", "<b>", " fox", "\n"][i % 4] for i in range(tokens)]
    first = np.arange(tokens) + np.arange(len(LAYERS))[:, None]
    experts = (first[..., None] + np.arange(choices)) % num_experts
    weights = scale * np.broadcast_to([0.75, *[0.25 / (choices - 1)] * (choices - 1)], experts.shape)
    passages = [Passage("one", pieces, experts, weights), Passage("<i>two", pieces[:8], experts[:, :8], weights[:, :8])]
    top = [{"piece": " fox", "token": 2, "count": 7, "total": 9, "lift": 3.1}]
    even = 1 / num_experts
    summary = {
        "experts_per_token": choices,
        "num_experts": num_experts,
        "layers": LAYERS,
        "domains": ["one", "<i>two"],
        "load": np.full((3, 2, num_experts), even).tolist(),
        "top_tokens": [[top, *[[]] * (num_experts - 1)] for _ in LAYERS],
        "load_over_training": {"steps": STEPS, "load": np.full((2, 3, num_experts), even).tolist()},
    }
    return explorer_page(passages, summary, [0, 2], "Routing of <run>")


def test_layers_experts_and_tooltips(tmp_path):
    page = make_page(100)
    found = run(
        page,
        tmp_path,
        """
        const texts = selector => [...document.querySelectorAll(selector)].map(node => node.textContent);
        const hover = span => span.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
        const found = { title: document.title, headings: texts("#text h2"), columns: texts("#text .head")[0] };
        found.text = document.querySelector("#text pre").textContent;
        found.classes = [...document.querySelectorAll("#text pre")].slice(0, 2).map(
          pre => [...pre.querySelectorAll("span")].slice(0, 5).map(span => span.className));
        hover(document.querySelectorAll("#text pre span")[2]);
        found.tip = texts("#tip th, #tip td");
        found.piece = texts("#tip code");
        found.shown = getComputedStyle(document.querySelector("#tip")).display;
        hover(document.querySelector("#text h2"));
        found.hidden = getComputedStyle(document.querySelector("#tip")).display;
        document.querySelectorAll("button.expert")[0].click();
        found.pressed = texts("button.expert[aria-pressed=true]");
        const colour = name => getComputedStyle(document.querySelector("#text pre span." + name)).backgroundColor;
        found.backgrounds = [colour("e0"), colour("e1")];
        found.top = texts("#panel table.top td").slice(0, 3);
        found.domains = texts("#panel table.domains td").slice(0, 4);
        found.curves = document.querySelectorAll("#panel svg polyline.load").length;
        document.querySelectorAll("button.expert")[0].click();
        found.released = [texts("button.expert[aria-pressed=true]").length, colour("e1")];
        document.querySelectorAll("#layers input")[1].click();
        found.layers = texts("#text .head")[0];
        for (const box of document.querySelectorAll("#layers input:checked")) box.click();
        found.none = document.querySelectorAll("#text pre").length;
        document.querySelectorAll("#layers input")[2].click();
        document.querySelectorAll("#text pre span")[1].click();
        found.clicked = texts("button.expert[aria-pressed=true]");
        return found;
        """,
    )
    assert isinstance(found, dict), found
    assert found["title"] == "Routing of <run>"
    assert found["headings"] == ["one", "<i>two"]
    assert found["columns"] == "layer 1layer 5"
    assert found["text"] == " the<b> fox\n" * 25
    assert found["classes"] == [["e0", "e1", "e2", "e3", "e0"], ["e2", "e3", "e0", "e1", "e2"]]
    assert found["tip"] == [
        *("▸ layer 1", "expert 2: 0.750", "expert 3: 0.250"),
        *("layer 5", "expert 0: 0.750", "expert 1: 0.250"),
    ]
    assert found["piece"] == ['" fox"']
    assert (found["shown"], found["hidden"]) == ("block", "none")
    assert found["pressed"] == ["0"]
    assert found["backgrounds"][1] == "rgba(0, 0, 0, 0)" != found["backgrounds"][0]
    assert found["top"] == [" fox", "7 of 9", "3.1×"]
    assert found["domains"] == ["one", "25.0 %", "<i>two", "25.0 %"]
    assert found["curves"] == 2 * EXPERTS
    assert found["released"][0] == 0
    assert found["released"][1] not in ("rgba(0, 0, 0, 0)", found["backgrounds"][0])
    assert found["layers"] == "layer 1layer 3layer 5"
    assert found["none"] == 0
    assert found["clicked"] == ["3"]


@pytest.mark.parametrize(("has_unit", "shown"), [(True, ("1.500", "0.500")), (False, ("1.000", "0.333"))])
def test_weights_above_1_are_shown(tmp_path, has_unit, shown):
    """Weights of 1.5 and 0.5, stored as shares of the unit 1.5; data of earlier versions has no unit, which means 1."""
    page = make_page(8, scale=2.0)
    page = page if has_unit else page.replace(', "unit": 1.5', "")
    hover = """
        const span = document.querySelector("#text pre span");
        span.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
        return [...document.querySelectorAll("#tip td")].map(node => node.textContent).slice(0, 2);
        """
    assert run(page, tmp_path, hover) == [f"expert {expert}: {weight}" for expert, weight in enumerate(shown)]


def test_long_texts_stay_responsive(tmp_path):
    """Only tokens near the view have elements, of 200,000 and whatever is selected."""
    page = make_page(200_000)
    found = run(
        page,
        tmp_path,
        """
        const spans = () => document.querySelectorAll("#text span").length;
        const timed = action => { const start = Date.now(); action(); return Date.now() - start; };
        const found = { length: document.querySelector("#text").textContent.length, spans: spans() };
        found.layer = timed(() => document.querySelectorAll("#layers input")[1].click());
        found.after = spans();
        found.pick = timed(() => document.querySelectorAll("button.expert")[1].click());
        document.querySelectorAll("#text .row")[300].scrollIntoView();
        return found;
        """,
    )
    assert isinstance(found, dict), found
    assert found["length"] > 2 * 600_000
    assert 0 < found["spans"] < 20_000
    assert 0 < found["after"] < 20_000
    assert found["layer"] < 5_000
    assert found["pick"] < 1_000


def test_a_phone_shows_64_experts(tmp_path):
    """A frame of 420 pixels, narrower than any window: nothing overflows sideways, and text and panel have room."""
    page = json.dumps(make_page(2_000, num_experts=64, choices=8)).replace("<", "\\u003c")
    found = run(
        "<!DOCTYPE html><body></body>",
        tmp_path,
        f"const page = {page};"
        """
        const frame = document.createElement("iframe");
        Object.assign(frame, { width: 420, height: 800 });
        document.body.append(frame);
        const inner = frame.contentDocument;
        inner.open(); inner.write(page); inner.close();
        const size = selector => inner.querySelector(selector).getBoundingClientRect();
        const found = { page: inner.documentElement.scrollWidth };
        found.columns = inner.querySelector("#text .head").textContent;
        found.header = size("header").height;
        found.text = size("#text pre").width;
        const last = inner.querySelectorAll("button.expert")[63];
        last.click();
        found.pressed = last.getAttribute("aria-pressed");
        found.panel = [size("#panel").width, size("#panel").bottom];
        const span = inner.querySelector("#text pre span");
        span.dispatchEvent(new MouseEvent("mouseover", { bubbles: true, clientX: 400, clientY: 300 }));
        found.tip = [size("#tip").left, size("#tip").right];
        const names = [...inner.querySelectorAll("button.expert")].map(button => button.style.background);
        found.colours = new Set(names).size;
        return found;
        """,
    )
    assert isinstance(found, dict), found
    assert found["page"] <= 420
    assert found["columns"] == "layer 5"
    assert found["header"] < 160
    assert found["text"] > 360
    assert found["pressed"] == "true"
    assert found["panel"][0] > 360
    assert found["panel"][1] <= 800
    assert found["tip"][0] >= 0
    assert found["tip"][1] <= 420
    assert found["colours"] == 64
