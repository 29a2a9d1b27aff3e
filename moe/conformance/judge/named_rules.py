"""Rules by the names of the models whose layers they are."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from .errors import InputError
from .rule import Rule

#: K is that of the first released model of the name.
RULES: Mapping[str, Rule] = {
    "mixtral": Rule(k=2, renormalise=True),
    "switch": Rule(k=1, activation="relu", capacity_factor=1.25),
    "qwen2_moe": Rule(k=4),
    "qwen3_moe": Rule(k=8, renormalise=True),
    "olmoe": Rule(k=8),
    "gpt_oss": Rule(k=4, renormalise=True, activation="gpt_oss"),
    "deepseek_v3": Rule(k=8, score="sigmoid", renormalise=True, scale=2.5, groups=8, kept_groups=4, scores_per_group=2),
}


def find_rule(rule: str | Rule, **changes: Any) -> Rule:
    """The rule of a name, or the one given, with other values of some of its fields.

    Raises:
        InputError: no rule or field of that name.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            near = difflib.get_close_matches(rule, RULES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"rule={rule!r}: must be one of {', '.join(RULES)}, or a Rule{hint}")
        rule = RULES[rule]
    fields = [field.name for field in dataclasses.fields(Rule)]
    for name in changes:
        if name not in fields:
            raise InputError(f"{name}: no field of a rule; these are {', '.join(fields)}")
    return dataclasses.replace(rule, **changes)
