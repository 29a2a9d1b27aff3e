"use strict";
// Controls and views of the page; tokenizer.js and model.js compute.

const byId = id => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const tokenizer = new Tokenizer(data.vocabulary);
const model = new Model(data, Uint8Array.from(atob(byId("weights").textContent), c => c.charCodeAt(0)));
const { num_experts: EXPERTS, layers: LAYERS } = model.config;
const SPARSE = LAYERS.flatMap((sparse, layer) => sparse ? [layer] : []);
const FACTORS = [0, 0.5, 0.75, 1, 1.25, 1.5, 2, 4];

const asTrained = () => ({
  rule: data.rules[0], k: model.config.k, capacity: model.config.capacity,
  off: Object.fromEntries(SPARSE.map(layer => [layer, new Set()])),
});
const state = { settings: asTrained(), ids: [], trained: null, result: null, token: 0, layer: 0 };

function element(name, properties = {}, children = []) {
  const node = Object.assign(document.createElement(name), properties);
  for (const [key, value] of Object.entries(properties)) if (key.startsWith("aria-")) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const mean = values => values.reduce((a, b) => a + b, 0) / values.length;
const percent = share => `${(100 * share).toFixed(share < 0.1 && share > 0 ? 1 : 0)} %`;
const rounded = share => share > 0 && share < 0.005 ? "<1%" : `${Math.round(100 * share)}%`;

// --- Computation ---

// Reads the text: its ids, or one message that says why there is nothing to compute.
function read(text) {
  const most = data.length, longest = most * tokenizer.longest;
  if (!text) return { ids: [], message: "Type some text, or take an example." };
  const ids = text.length > longest ? null : [tokenizer.bos, ...tokenizer.encode(text)];
  if (ids && ids.length <= most) return { ids, message: "" };
  const size = ids ? `${ids.length - 1} tokens` : `${text.length.toLocaleString("en")} characters`;
  return { ids: [], message: `The text has ${size}; the model reads at most ${most - 1} tokens. Shorten it.` };
}

function evaluate(settings = state.settings, ids = state.ids) {
  const { routing, losses, next } = model.forward(ids, settings);
  let sent = 0, kept = 0, without = 0;
  for (const { assignments } of routing) {
    for (const of of assignments) {
      sent += of.length;
      kept += of.filter(assignment => assignment.kept).length;
      without += of.every(assignment => !assignment.kept);
    }
  }
  return { routing, losses, next, loss: mean(losses), sent, dropped: sent - kept, without };
}

function readText() {
  const { ids, message } = read(byId("text").value);
  byId("message").textContent = message;
  document.body.classList.toggle("empty", !ids.length);
  Object.assign(state, { ids, token: Math.min(state.token, Math.max(ids.length - 1, 0)) });
  state.trained = ids.length ? evaluate(asTrained()) : null;
  update();
}

function update() {
  state.result = state.ids.length ? evaluate() : null;
  showControls();
  showResults();
  showExperts();
  showTokens();
  showToken();
  showExplanations();
}

// --- Settings ---

function showControls() {
  const { rule, k, capacity } = state.settings;
  byId("rule").value = data.rules.indexOf(rule);
  byId("k").value = k;
  byId("k-value").textContent = k;
  byId("k").disabled = rule.kind === "all";
  byId("capacity").value = capacity;
}

function makeControls() {
  byId("rule").append(...data.rules.map((rule, value) => element("option", { value, textContent: rule.name })));
  byId("k").max = EXPERTS;
  const factors = [...new Set([...FACTORS, model.config.capacity])].sort((a, b) => a - b);
  byId("capacity").append(...factors.map(
    value => element("option", { value, textContent: value ? String(value) : "none: no drops" })));
  const change = (id, apply) => byId(id).addEventListener("input", event => { apply(event.target.value); update(); });
  change("rule", value => { state.settings.rule = data.rules[value]; });
  change("k", value => { state.settings.k = Number(value); });
  change("capacity", value => { state.settings.capacity = Number(value); });
  byId("reset").addEventListener("click", () => { state.settings = asTrained(); update(); });
  byId("examples").append(...data.examples.map(({ name, text }) => {
    const button = element("button", { type: "button", textContent: name });
    button.addEventListener("click", () => { byId("text").value = text; readText(); });
    return button;
  }));
  let timer = 0;
  byId("text").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(readText, 200); });
}

// --- Loss and drops ---

function showResults() {
  const { result, trained } = state;
  byId("loss").textContent = result ? result.loss.toFixed(3) : "–";
  const change = result ? result.loss - trained.loss : 0;
  byId("change").textContent = !result || Math.abs(change) < 5e-4 ? "" :
    `${change > 0 ? "+" : "−"}${Math.abs(change).toFixed(3)} against ${trained.loss.toFixed(3)} as trained`;
  byId("dropped").textContent = result ? result.dropped : "–";
  byId("dropped-share").textContent = result?.sent ? `of ${result.sent}, ${percent(result.dropped / result.sent)}` : "";
  byId("without").textContent = result ? result.without : "–";
}

// --- Experts ---

// Share of a layer's kept assignments that each expert has.
function shares({ assignments }) {
  const counts = new Array(EXPERTS).fill(0);
  for (const of of assignments) for (const { expert, kept } of of) counts[expert] += kept;
  const sum = counts.reduce((a, b) => a + b, 0) || 1;
  return counts.map(count => count / sum);
}

function toggle(layers, expert) {
  const { off } = state.settings, isOff = layers.every(layer => off[layer].has(expert));
  for (const layer of layers) {
    if (isOff) off[layer].delete(expert);
    else if (off[layer].size < EXPERTS - 1) off[layer].add(expert);  // one always stays
  }
  update();
}

function makeExperts() {
  const button = (layers, expert, where) => {
    const made = element("button", {
      type: "button", className: "e" + expert, "aria-pressed": "false", textContent: expert,
      "aria-label": `switch expert ${expert} off in ${where}`,
    });
    made.addEventListener("click", () => toggle(layers, expert));
    return element("td", {}, [made]);
  };
  const row = (layers, where) => element("tr", {}, [
    element("th", { scope: "row", textContent: where }),
    ...Array.from({ length: EXPERTS }, (_, expert) => button(layers, expert, where))]);
  byId("experts").append(element("tbody", {}, [
    row(SPARSE, "all"), ...SPARSE.map(layer => row([layer], `layer ${layer}`))]));
}

function showExperts() {
  const { off } = state.settings;
  [...byId("experts").rows].forEach((row, number) => {
    const layers = number ? [SPARSE[number - 1]] : SPARSE;
    const routed = number && state.result ? state.result.routing[number - 1] : null, of = routed && shares(routed);
    [...row.querySelectorAll("button")].forEach((button, expert) => {
      const pressed = layers.every(layer => off[layer].has(expert));
      button.setAttribute("aria-pressed", pressed);
      button.textContent = of ? rounded(of[expert]) : expert;
      const share = of ? `, ${percent(of[expert])} of assignments` : "", pooled = !!routed?.pool?.includes(expert);
      button.classList.toggle("pooled", pooled);
      button.setAttribute("aria-label", `switch expert ${expert} off in ${row.cells[0].textContent}${share}${pooled ? ", in the pool" : ""}`);
    });
  });
  const pool = state.result?.routing[0].pool;
  byId("pool").textContent = pool ? "A frame marks the text's pool in each layer: the experts with the largest sums of the " +
    "softmax over its tokens. All of them, and those of a continuation, are routed within it." : "";
}

// --- Tokens ---

const shown = id => tokenizer.show(id).replaceAll("\n", "↵");

function showTokens() {
  const focused = document.activeElement?.classList.contains("token");
  const blocks = state.result ? state.result.routing.flatMap(({ layer, assignments }, number) => [
    element("h3", { textContent: `Layer ${layer}` }),
    element("div", { className: "tokens", role: "group", "aria-label": `layer ${layer}` }, state.ids.map((id, token) => {
      const of = assignments[token], first = of[0]?.expert, lost = of.some(({ kept }) => !kept) || !of.length;
      const label = `${shown(id)}, layer ${layer}, ${of.length ? `expert ${first}` : "no expert"}${lost ? ", dropped" : ""}`;
      const chip = element("button", {
        type: "button", className: `token e${first}${lost ? " lost" : ""}`, textContent: shown(id), "aria-label": label,
        tabIndex: -1,
      }, [element("sub", { textContent: first ?? "–" })]);
      chip.place = [token, number];
      return chip;
    }))]) : [];
  byId("layers").replaceChildren(...blocks);
  const largest = 8;  // nats of the darkest colour
  byId("losses").replaceChildren(...state.ids.map((id, token) => {
    const loss = token && state.result ? state.result.losses[token - 1] : 0;
    const span = element("span", { textContent: tokenizer.show(id), title: token ? `${loss.toFixed(2)} nats` : "beginning of the text" });
    span.style.backgroundColor = `rgb(214 69 65 / ${Math.min(loss / largest, 1).toFixed(3)})`;
    return span;
  }));
  choose(state.token, state.layer, focused);
}

const chip = (token, number) => document.querySelectorAll("#layers .tokens")[number]?.children[token];

function choose(token, number, focus) {
  document.querySelectorAll(".token.chosen").forEach(other => other.classList.remove("chosen"));
  document.querySelectorAll(".token[tabindex='0']").forEach(other => { other.tabIndex = -1; });
  Object.assign(state, { token, layer: number });
  SPARSE.forEach((_, layer) => chip(token, layer)?.classList.add("chosen"));
  const own = chip(token, number);
  if (!own) return;
  own.tabIndex = 0;
  if (focus) own.focus();
}

function moveByKeys(event) {
  if (!event.target.place) return;
  const [token, number] = event.target.place;
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const ends = { Home: 0, End: state.ids.length - 1 };
  const [right, down] = moves[event.key] ?? [0, 0];
  const next = ends[event.key] ?? Math.min(Math.max(token + right, 0), state.ids.length - 1);
  if (!(event.key in moves) && !(event.key in ends)) return;
  event.preventDefault();
  choose(next, Math.min(Math.max(number + down, 0), SPARSE.length - 1), true);
  showToken();
}

function showToken() {
  const { result, token, ids } = state;
  if (!result) {
    byId("token").textContent = "None: there is no text.";
    byId("next").textContent = "–";
    return;
  }
  const loss = token ? `loss ${result.losses[token - 1].toFixed(3)} nats, probability ${percent(Math.exp(-result.losses[token - 1]))}`
    : "the beginning of the text, which is given";
  byId("token").replaceChildren(
    element("p", { textContent: `${JSON.stringify(shown(ids[token]))}, token ${token}, id ${ids[token]}: ${loss}` }),
    element("table", {}, [element("tbody", {}, result.routing.map(({ layer, assignments }) => element("tr", {}, [
      element("th", { scope: "row", textContent: `layer ${layer}` }),
      element("td", {}, assignments[token].flatMap(({ expert, weight, kept }) => [
        element("span", {
          className: `key e${expert}${kept ? "" : " off"}`,
          textContent: `${expert}: ${weight.toFixed(3)}${kept ? "" : " dropped"}`,
        }), " "])),
    ])))]));
  byId("next").textContent = result.next.map(
    ({ id, probability }) => `${JSON.stringify(shown(id))} ${percent(probability)}`).join(", ");
}

// --- Explanations with the numbers of this text ---

function showExplanations() {
  const { settings, result, ids } = state;
  if (!result) return;
  const first = result.routing[0], of = first.assignments[state.token];
  byId("router-example").textContent = `Here token ${JSON.stringify(shown(ids[state.token]))} has the weights ` +
    `${of.slice(0, 4).map(({ weight }) => weight.toFixed(3)).join(" and ")} in layer ${first.layer}.`;
  const on = EXPERTS - settings.off[first.layer].size, tokens = ids.length;
  const k = settings.rule.kind === "all" ? on : Math.min(settings.k, on);  // as route() has it
  const exact = `ceil(${settings.capacity} · ${k} · ${tokens} / ${on})`;
  byId("capacity-example").textContent = settings.capacity ?
    `Here C = ${settings.capacity * k > on ? `min(${tokens}, ${exact})` : exact} = ${first.capacity}.` :
    `Here, with a factor of 1, C would be ceil(${k} · ${tokens} / ${on}) = ${expertCapacity(1, k, tokens, on)}.`;
  const largest = Math.max(...shares(first));
  byId("balance-example").textContent = `Here the busiest expert of layer ${first.layer} has ${percent(largest)}, ` +
    `where 1/E is ${percent(1 / EXPERTS)}.`;
}

function makeExplanations() {
  for (const node of document.querySelectorAll(".L")) node.textContent = SPARSE.length;
  for (const node of document.querySelectorAll(".E")) node.textContent = EXPERTS;
  byId("sizes").textContent = data.sizes;
  byId("about").textContent = data.about;
}

byId("colours").textContent = data.colours.map((colour, i) => `.e${i} { background: ${colour}; }`).join("\n");
byId("layers").addEventListener("keydown", moveByKeys);
byId("layers").addEventListener("click", event => {
  const place = event.target.closest(".token")?.place;
  if (!place) return;
  choose(...place, true);
  showToken();
  showExplanations();
});
makeControls();
makeExperts();
makeExplanations();
byId("text").value = data.examples[0].text;
readText();
