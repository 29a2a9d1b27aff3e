"""How long runs were: training tokens for each active parameter, and epochs of each domain."""

from __future__ import annotations

from collections.abc import Mapping

from moe.data.preparation import row_shares
from moe.lab.table import Table


def regime(found: Table) -> str:
    """Tokens, tokens for each active parameter of the first arm, and epochs, of a suite's longest horizon."""
    base = next(iter(found.suite.variants))
    tokens, each, epochs = _numbers(found)
    text = f"{tokens} training tokens, {each:.1f} per active parameter of the arm {base}"
    return f"{text}; epochs: {epochs}" if epochs else text


def regimes(tables: Mapping[str, Table]) -> str:
    """The same for all suites that have runs, grouped by length."""
    alike: dict[tuple[str, str], dict[str, float]] = {}
    for name, found in tables.items():
        if found.horizons:
            tokens, each, epochs = _numbers(found)
            alike.setdefault((tokens, epochs), {})[name] = each
    parts = []
    for (tokens, epochs), suites in alike.items():
        ends = sorted({f"{each:.1f}" for each in (min(suites.values()), max(suites.values()))}, key=float)
        each = f"{' to '.join(ends)} per active parameter of a suite's first arm"
        text = f"{', '.join(suites)}: {tokens} training tokens, {each}"
        parts.append(f"{text}; epochs: {epochs}." if epochs else f"{text}.")
    return " ".join(parts)


def _numbers(found: Table) -> tuple[str, float, str]:
    """(tokens, tokens for each active parameter of the first arm, epochs of each domain)."""
    suite, base = found.suite, next(iter(found.suite.variants))
    tokens = suite.longest * suite.tokens_per_step
    config = suite.config(base)
    shares = row_shares(config.data, config.data.domains)
    read = tokens * (1 + 1 / config.data.sequence_length)  # a row is cut from T + 1 tokens
    sizes = {name: size for name, size in suite.domain_tokens.items() if name in shares}
    epochs = ", ".join(f"{name} {read * shares[name] / size:.2f}" for name, size in sizes.items())
    return f"{tokens / 1e6:.3g}M", tokens / suite.costs(base)["active_parameters"], epochs
