"""A plain trainer of a small MoE model in float32, with experts split over ranks, and eight faults to plant in it."""

import jax
import jax.numpy as jnp
import numpy as np

V, D, F, E, K, RANKS, RANK = 12, 8, 6, 8, 2, 4, 2
EXPERTS = ("up", "gate", "down", "up_a", "up_b")
LR, B1, B2, EPS, DECAY, CLIP, BALANCE, Z, BIAS, SCALE = 1e-2, 0.9, 0.95, 1e-3, 0.1, 0.3, 0.5, 0.1, 0.05, 2.0


def kind(name):
    return name.rsplit(".", 1)[-1]


def initial(seed=0, adapters=False, layers=2):
    rng = np.random.default_rng(seed)
    shapes = {"router": (D, E), "up": (E, D, F), "gate": (E, D, F), "down": (E, F, D)}
    shapes |= {"up_a": (E, D, RANK), "up_b": (E, RANK, F)} if adapters else {}
    weights = {"embedding": rng.normal(size=(V, D)), "unembedding": rng.normal(size=(D, V)) * 0.3}
    for layer in range(layers):
        weights |= {f"layers.{layer}.{name}": rng.normal(size=shape) * 0.5 for name, shape in shapes.items()}
        weights[f"layers.{layer}.bias"] = np.zeros(E)
    return {name: array.astype(np.float32) for name, array in weights.items()}


def batches(seed=1, steps=2, microbatches=2, rows=2, length=8):
    """Ids, and targets with much padding in the first microbatch and little in the second."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (steps, microbatches, rows, length))
    targets = rng.integers(0, V, tokens.shape)
    for microbatch in range(microbatches):
        targets[:, microbatch, :, length - 4 + 3 * microbatch :] = -1
    return tokens, targets


def moe(w, x, real, bias, fault):
    """Top-2 of softmax plus bias, renormalised; (y, balance loss, z-loss, load)."""
    logits = x @ w["router"]
    probs = jax.nn.softmax(logits)
    index = jax.lax.top_k(probs + bias, K)[1]
    chosen = jnp.take_along_axis(probs, index, -1)
    combine = jnp.einsum("...k,...ke->...e", chosen / chosen.sum(-1, keepdims=True), jax.nn.one_hot(index, E))
    up = w["up"]
    if "up_a" in w:
        a = w["up_a"][..., ::-1] if fault == "adapter columns" else w["up_a"]
        up = up + SCALE * jnp.einsum("edr,erf->edf", a, w["up_b"])
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, w["gate"])) * jnp.einsum("btd,edf->btef", x, up)
    y = jnp.einsum("bte,btef,efd->btd", combine * real[..., None], hidden, w["down"])
    tokens, load = real.sum(), (jax.nn.one_hot(index, E).sum(2) * real[..., None]).sum((0, 1))
    balance = E * jnp.sum(load / (K * tokens) * (probs * real[..., None]).sum((0, 1)) / tokens)
    return y, balance, (jax.nn.logsumexp(logits, -1) ** 2 * real).sum() / tokens, load


def losses(trained, fixed, ids, targets, share, fault):
    """(Objective of a microbatch, (cross-entropy, balance loss, z-loss, loads [L,E])); share of the balance loss."""
    weights, real = fixed | trained, (targets >= 0) * 1.0
    x, balance, z, loads = weights["embedding"][ids], 0.0, 0.0, []
    for layer in range(sum(name.endswith(".router") for name in weights)):
        own = {kind(name): array for name, array in weights.items() if name.startswith(f"layers.{layer}.")}
        y, more, more_z, load = moe(own, x, real, own["bias"], fault)
        x, balance, z, loads = x + y, balance + more * share, z + more_z * share, [*loads, load]
    log_probs = jax.nn.log_softmax(x @ weights["unembedding"])
    nll = -(jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], -1)[..., 0] * real).sum()
    return nll, (balance, z, jnp.stack(loads))


def step(weights, moments, tokens, targets, count, fault):
    """(Weights, moments, numbers, gradients) after one step of AdamW over the microbatches."""
    names = [n for n in weights if kind(n) in (("up_a", "up_b") if adapted(weights) else (*EXPERTS, "router"))]
    names += [] if adapted(weights) else ["embedding", "unembedding"]
    fixed = {name: array for name, array in weights.items() if name not in names}
    total, sums, loads = (targets >= 0).sum(), np.zeros(3), 0.0
    gradients = {name: 0.0 for name in names}
    for ids, wanted in zip(tokens, targets, strict=True):
        share = 1.0 if fault == "balance loss added" else 1 / len(tokens)
        share = (wanted >= 0).sum() / total if fault == "balance loss by tokens" else share

        def objective(trained, ids=ids, wanted=wanted, share=share):
            nll, (balance, z, load) = losses(trained, fixed, ids, wanted, share, fault)
            nll = nll / total
            return nll + BALANCE * balance + Z * z, (nll, balance, z, load)

        found, (*numbers, load) = jax.grad(objective, has_aux=True)({name: weights[name] for name in names})
        gradients = {name: gradients[name] + found[name] for name in names}
        sums, loads = sums + np.asarray(numbers), loads + load
    norm = global_norm(gradients, fault)
    clipped = min(1.0, CLIP / norm)
    after = dict(weights)
    for name in names:
        gradient = gradients[name] * clipped
        first, second = moments.get(name, (0.0, 0.0))
        first, second = B1 * first + (1 - B1) * gradient, B2 * second + (1 - B2) * gradient**2
        moments[name] = first, second
        update = first / (1 - B1**count) / (jnp.sqrt(second / (1 - B2**count)) + EPS) + DECAY * weights[name]
        if not (fault == "router update lost" and kind(name) == "router"):
            after[name] = weights[name] - LR * update
    for layer, load in enumerate(loads):
        name = f"layers.{layer}.bias"
        after[name] = weights[name] + BIAS * np.sign(load.mean() - load)
    return after, moments, [*sums, norm], gradients


def adapted(weights):
    return any(kind(name) == "up_a" for name in weights)


def global_norm(gradients, fault):
    """Norm over ranks: experts are split over them, everything else is on each."""
    squares = {name: float((array**2).sum()) for name, array in gradients.items()}
    times = {"experts once per rank": RANKS, "experts of one rank": 1 / RANKS}.get(fault, 1)
    return sum(value * (times if kind(name) in EXPERTS else 1) for name, value in squares.items()) ** 0.5


def save_and_load(weights, folder, fault):
    """Save the experts of each of RANKS ranks to a file of its own; load them for half as many ranks."""
    size = E // RANKS
    for rank in range(RANKS):
        from_rank = 0 if fault == "checkpoint of one rank" else rank
        part = slice(from_rank * size, (from_rank + 1) * size)
        np.savez(folder / f"{rank}.npz", **{n: a[part] for n, a in weights.items() if kind(n) in EXPERTS})
    parts = [dict(np.load(folder / f"{rank}.npz")) for rank in range(RANKS)]
    if fault == "conversion drops experts":
        parts[1:] = [{name: np.zeros_like(array) for name, array in part.items()} for part in parts[1:]]
    return weights | {name: jnp.concatenate([part[name] for part in parts]) for name in parts[0]}


def train(weights, tokens, targets, folder, fault=""):
    """Arrays that a judge compares, of steps with a restart after the first."""
    moments, numbers, results = {}, [], {}
    weights = {name: jnp.asarray(array) for name, array in weights.items()}
    for count in range(len(tokens)):
        weights, moments, shown, gradients = step(weights, moments, tokens[count], targets[count], count + 1, fault)
        numbers.append(shown)
        if count == 0:
            results |= {f"grad.{name}": array for name, array in gradients.items()}
            weights = save_and_load(weights, folder, fault)
            results |= {f"restored.{name}": array for name, array in weights.items()}
    names = ("cross_entropy", "balance_loss", "z_loss", "gradient_norm")
    results |= dict(zip(names, np.asarray(numbers).T, strict=True))
    return {
        name: np.asarray(array) for name, array in (results | {f"after.{n}": a for n, a in weights.items()}).items()
    }
