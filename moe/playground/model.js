"use strict";
// The decoder-only MoE Transformer of moe/models/decoder.py on one text, in plain loops.
// Letters: T tokens, D model dim, E experts, K experts per token, C capacity, F hidden dim of an FFN.

const ACTIVATIONS = {
  swiglu: (gate, up) => gate / (1 + Math.exp(-gate)) * up,
  geglu: (gate, up) => gelu(gate) * up,
  reglu: (gate, up) => Math.max(gate, 0) * up,
  gelu: (gate, up) => gelu(up),
  relu: (gate, up) => Math.max(up, 0),
};

const gelu = x => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));

// --- Routing: the rules of moe/routing/gates.py in evaluation, and the plan of moe/dispatch/buffers.py ---

function softmax(values) {
  const largest = Math.max(...values), powers = values.map(value => Math.exp(value - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map(power => power / sum);
}

const SCORES = {
  softmax,
  sigmoid: values => values.map(value => 1 / (1 + Math.exp(-value))),
  sqrt_softplus: values => values.map(
    value => Math.sqrt(Math.max(Math.max(value, 0) + Math.log1p(Math.exp(-Math.abs(value))), 1e-30))),
};

// Indices by falling value, ties to the lower index.
const ranked = values => values.map((_, i) => i).sort((a, b) => values[b] - values[a] || a - b);

// C = ceil(factor · K·S/E), at least 1 and at most S.
function expertCapacity(factor, k, tokens, experts) {
  const exact = Number((factor * k * tokens / experts).toFixed(9));
  return Math.max(1, Math.min(tokens, Math.ceil(exact)));
}

// murmur3's finalizer over (id, expert).
function hashes(id, experts) {
  return Array.from({ length: experts }, (_, expert) => {
    let h = (Math.imul(id, experts) + expert + 0x9e3779b9) >>> 0;
    for (const factor of [0x85ebca6b, 0xc2b2ae35]) h = Math.imul(h ^ (h >>> 16), factor) >>> 0;
    return ((h ^ (h >>> 16)) >>> 0) >>> 8;
  });
}

const RULES = {
  // Top-k of the scores (+ selection bias), weighted by the scores; with a pool, of the logits within it.
  topk(logits, { rule, k, bias, pool }) {
    return logits.map(of => {
      const scores = SCORES[rule.score](pool ? of.map((logit, i) => pool.has(i) ? logit : -Infinity) : of);
      const chosen = ranked(scores.map((score, i) => score + bias[i])).slice(0, k);
      const sum = rule.renormalise ? chosen.reduce((total, expert) => total + scores[expert], 1e-18) : 1;
      return chosen.map(expert => ({ expert, weight: scores[expert] / sum * rule.scale }));
    });
  },
  // Every expert, weighted by the softmax.
  all(logits) {
    return logits.map(of => softmax(of).map((weight, expert) => ({ expert, weight })));
  },
  // Each expert takes the C tokens with its highest probability.
  choice(logits, { capacity }) {
    const probs = logits.map(softmax), experts = logits[0].length;
    const found = probs.map(of => of.map((weight, expert) => ({ expert, weight, declined: true })));
    for (let expert = 0; expert < experts; expert++) {
      for (const token of ranked(probs.map(of => of[expert])).slice(0, capacity)) found[token][expert].declined = false;
    }
    return found;
  },
  // K experts by a hash of the token id, weighted equally.
  hash(logits, { k, ids }) {
    return logits.map((of, token) => ranked(hashes(ids[token], of.length)).slice(0, k).map(
      expert => ({ expert, weight: 1 / k })));
  },
};

// The experts with the largest sums of the softmax over the text's tokens: a share of all, at least k.
function poolOf(logits, share, k) {
  const sums = logits.map(softmax).reduce((a, b) => a.map((sum, i) => sum + b[i]));
  return new Set(ranked(sums).slice(0, Math.max(k, Math.ceil(share * sums.length))));
}

// Assignments of every token: [{ expert, weight, kept }], first choice first; and the pool of a rule that has one.
//   logits: [T][E]; on: experts that may be used; settings: { rule, k, capacity: factor or 0, bias: [E], ids: [T] }.
function route(logits, on, settings) {
  const tokens = logits.length, k = Math.min(settings.k, on.length);
  const bias = on.map(expert => settings.rule.own ? settings.bias?.[expert] ?? 0 : 0);
  // Without a capacity factor, an expert takes all tokens that choose it; expert choice then uses a factor of 1.
  const { kind } = settings.rule, factor = settings.capacity || (kind === "choice" ? 1 : Infinity);
  const capacity = expertCapacity(factor, kind === "all" ? on.length : k, tokens, on.length);
  const own = logits.map(of => on.map(expert => of[expert]));
  const pool = settings.rule.pool ? poolOf(own, settings.rule.pool, k) : null;
  const found = RULES[kind](own, { ...settings, k, bias, capacity, pool });
  const columns = found[0].length;
  // Buffers are filled with all first choices in token order, then all second choices, and so on.
  const used = new Array(on.length).fill(0);
  for (let column = 0; column < columns; column++) {
    for (const of of found) {
      const assignment = of[column];
      assignment.kept = !assignment.declined && used[assignment.expert]++ < capacity;
    }
  }
  const assignments = found.map(of => of.filter(assignment => !assignment.declined).map(
    ({ expert, weight, kept }) => ({ expert: on[expert], weight, kept })));
  if (kind === "all" || kind === "choice") {
    for (const of of assignments) of.sort((a, b) => b.weight - a.weight || a.expert - b.expert);
  }
  return { assignments, capacity, pool: pool && on.filter((_, i) => pool.has(i)) };
}

// --- The model ---

class Model {
  // header: { config, tensors: { name: { offset, rows, columns, int8 } } }; bytes: of all tensors
  // (moe/playground/page.py): float32 scales of the rows and their int8 values, or float32 values.
  constructor(header, bytes) {
    this.config = header.config;
    this.tensors = {};
    for (const [name, { offset, rows, columns, int8 }] of Object.entries(header.tensors)) {
      const values = new Float32Array(rows * columns);
      if (int8) {
        const scales = new Float32Array(bytes.buffer.slice(offset, offset + 4 * rows));
        const whole = new Int8Array(bytes.buffer, offset + 4 * rows, rows * columns);
        for (let i = 0; i < values.length; i++) values[i] = whole[i] * scales[Math.floor(i / columns)];
      } else {
        values.set(new Float32Array(bytes.buffer.slice(offset, offset + 4 * values.length)));
      }
      this.tensors[name] = { values, rows, columns };
    }
  }

  // x: [T·columns] → [T·count], by rows first … first + count of a matrix.
  matmul(x, name, first = 0, count = this.tensors[name].rows) {
    const { values, columns } = this.tensors[name], tokens = x.length / columns;
    const y = new Float32Array(tokens * count);
    for (let row = 0; row < count; row++) {
      const start = (first + row) * columns;
      for (let token = 0; token < tokens; token++) {
        const at = token * columns;
        let even = 0, odd = 0;  // two sums: an addition need not wait for the one before
        for (let i = 0; i + 1 < columns; i += 2) {
          even += values[start + i] * x[at + i];
          odd += values[start + i + 1] * x[at + i + 1];
        }
        if (columns % 2) even += values[start + columns - 1] * x[at + columns - 1];
        y[token * count + row] = even + odd;
      }
    }
    return y;
  }

  norm(x, name) {
    const { values, columns } = this.tensors[name], y = new Float32Array(x.length);
    for (let at = 0; at < x.length; at += columns) {
      let sum = 0;
      for (let i = 0; i < columns; i++) sum += x[at + i] ** 2;
      const factor = 1 / Math.sqrt(sum / columns + this.config.norm_eps);
      for (let i = 0; i < columns; i++) y[at + i] = x[at + i] * factor * values[i];
    }
    return y;
  }

  // Rotary positions of pairs (i, i + H/2).
  rotate(x, heads) {
    const { head_dim: size, rope_theta: theta } = this.config, half = size / 2;
    for (let at = 0; at < x.length; at += size) {
      const position = Math.floor(at / (heads * size));
      for (let i = 0; i < half; i++) {
        const angle = position * theta ** (-i / half), cos = Math.cos(angle), sin = Math.sin(angle);
        const first = x[at + i], second = x[at + i + half];
        x[at + i] = first * cos - second * sin;
        x[at + i + half] = second * cos + first * sin;
      }
    }
    return x;
  }

  attention(x, layer) {
    const { num_heads: heads, num_kv_heads: kvHeads, head_dim: size } = this.config;
    const query = this.rotate(this.matmul(x, `${layer}.query`), heads);
    const key = this.rotate(this.matmul(x, `${layer}.key`), kvHeads), value = this.matmul(x, `${layer}.value`);
    const tokens = query.length / (heads * size), joined = new Float32Array(query.length);
    const factor = this.config.attention_scale || 1 / Math.sqrt(size);
    for (let head = 0; head < heads; head++) {
      const kvHead = Math.floor(head / (heads / kvHeads));
      for (let token = 0; token < tokens; token++) {
        const at = (token * heads + head) * size, scores = [];
        for (let earlier = 0; earlier <= token; earlier++) {
          const from = (earlier * kvHeads + kvHead) * size;
          let sum = 0;
          for (let i = 0; i < size; i++) sum += query[at + i] * key[from + i];
          scores.push(sum * factor);
        }
        softmax(scores).forEach((weight, earlier) => {
          const from = (earlier * kvHeads + kvHead) * size;
          for (let i = 0; i < size; i++) joined[at + i] += weight * value[from + i];
        });
      }
    }
    return this.matmul(joined, `${layer}.out`);
  }

  // One FFN, or expert number `expert` of a stack.
  ffn(x, name, expert = 0) {
    const hidden = this.tensors[`${name}.down`].columns, width = this.config.d_model;
    const activate = ACTIVATIONS[this.config.activation];
    const up = this.matmul(x, `${name}.up`, expert * hidden, hidden);
    const gate = this.tensors[`${name}.gate`] ? this.matmul(x, `${name}.gate`, expert * hidden, hidden) : up;
    return this.matmul(up.map((value, i) => activate(gate[i], value)), `${name}.down`, expert * width, width);
  }

  moe(x, layer, ids, settings) {
    const width = this.config.d_model, tokens = ids.length, experts = this.config.num_experts;
    const flat = this.matmul(x, `${layer}.router`), logits = [];
    for (let token = 0; token < tokens; token++) {
      logits.push(Array.from(flat.subarray(token * experts, (token + 1) * experts)));
    }
    const on = [...Array(experts).keys()].filter(expert => !settings.off[layer]?.has(expert));
    const bias = this.tensors[`${layer}.bias`]?.values;
    const { assignments, capacity, pool } = route(logits, on, { ...settings, bias, ids });
    const y = this.tensors[`${layer}.shared.up`] ? this.ffn(x, `${layer}.shared`) : new Float32Array(x.length);
    for (const expert of on) {
      const sent = assignments.flatMap((of, token) => of.filter(
        assignment => assignment.kept && assignment.expert === expert).map(({ weight }) => ({ token, weight })));
      if (!sent.length) continue;
      const rows = new Float32Array(sent.length * width);
      sent.forEach(({ token }, row) => rows.set(x.subarray(token * width, (token + 1) * width), row * width));
      const out = this.ffn(rows, `${layer}.experts`, expert);
      sent.forEach(({ token, weight }, row) => {
        for (let i = 0; i < width; i++) y[token * width + i] += weight * out[row * width + i];
      });
    }
    return { y, assignments, capacity, pool };
  }

  // ids: the beginning of a text, then its tokens. settings: { rule, k, capacity, off: { layer: Set of experts } }.
  // Returns the routing of each MoE layer, the loss of every token after the first, nats, and the likeliest next ones.
  forward(ids, settings) {
    const { d_model: width, layers, embedding_scale: scale, residual_scale: residual } = this.config;
    const table = this.tensors.embedding.values;
    let x = new Float32Array(ids.length * width);
    ids.forEach((id, token) => {
      for (let i = 0; i < width; i++) x[token * width + i] = table[id * width + i] * scale;
    });
    const add = y => { for (let i = 0; i < x.length; i++) x[i] += y[i] * residual; };
    const routing = [];
    layers.forEach((sparse, layer) => {
      add(this.attention(this.norm(x, `${layer}.attention_norm`), layer));
      const h = this.norm(x, `${layer}.ffn_norm`);
      if (!sparse) return add(this.ffn(h, `${layer}.dense`));
      const { y, ...routed } = this.moe(h, layer, ids, settings);
      add(y);
      routing.push({ layer, ...routed });
    });
    const logits = this.matmul(this.norm(x, "final_norm"), this.tensors.unembedding ? "unembedding" : "embedding");
    const size = this.config.vocab_size, losses = [];
    const of = token => Array.from(
      logits.subarray(token * size, (token + 1) * size), value => value * this.config.logit_scale);
    for (let token = 0; token + 1 < ids.length; token++) {
      losses.push(-Math.log(Math.max(softmax(of(token))[ids[token + 1]], 1e-30)));
    }
    const last = softmax(of(ids.length - 1));
    const next = ranked(last).slice(0, 5).map(id => ({ id, probability: last[id] }));
    return { routing, losses, next };
  }
}
