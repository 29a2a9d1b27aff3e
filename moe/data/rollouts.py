"""Rollouts in files: a prompt with a group of sampled completions, their log-probabilities, rewards and experts.

A line of JSON, or a row of a table, is a prompt and all completions whose rewards are compared with one another::

    {"prompt_tokens": [5, 9], "completions": [{"tokens": [7, 2], "log_probs": [-0.3, -1.2], "reward": 1.0}, ...]}

With ``"engine": "vllm"`` each completion also has ``experts``, the record of that engine (:mod:`moe.data.engines`) for
all tokens of prompt and completion except the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import pydantic

from moe.data.engines import EngineName
from moe.system.foreign_files import Fields, dumps, first_sentence, loads

#: Begins a document that is rollouts, as JSON.
ROLLOUTS = "\x1c"
#: Fields of a line, or columns of a table.
FIELDS, FIELDS_WITH_EXPERTS = ("prompt_tokens", "completions"), ("prompt_tokens", "completions", "engine")
#: Columns of a table with one completion per row and an id for each group; such a table is refused.
ROW_FIELDS = ("prompt_tokens", "tokens")
ONE_COMPLETION = (
    "holds one completion; a record must hold a prompt and all its completions: join the rows of each group id into "
    "'prompt_tokens' and a list 'completions'"
)

_Token = Annotated[int, pydantic.Field(ge=0, lt=1 << 31)]
_Tokens = Annotated[list[_Token], pydantic.Field(min_length=1)]
#: Bound of rewards and log-probabilities: their differences are finite in float32.
_LARGEST = 1e30
#: Above 0, since rounding may raise a probability of 1 a little.
_LogProb = Annotated[float, pydantic.Field(ge=-_LARGEST, le=1e-3, allow_inf_nan=False)]
#: Experts of one sequence, where the engine records arrays.
_LISTS = pydantic.TypeAdapter(list[list[list[int]]], config=pydantic.ConfigDict(strict=True))


class Completion(Fields):
    """One sampled completion.

    Attributes:
        tokens: sampled ids, the stop token included.
        log_probs: of each of them when it was sampled, in nats, at temperature 1 over the whole vocabulary.
        reward: of the whole completion.
        experts: the engine's record, of all tokens of prompt and completion but the last.
    """

    tokens: _Tokens
    log_probs: list[_LogProb]
    reward: Annotated[float, pydantic.Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)]
    experts: Any = None

    @pydantic.field_validator("experts")
    @classmethod
    def _whole_numbers(cls, value: Any) -> Any:
        try:
            return _LISTS.validate_python(value) if isinstance(value, list) else value
        except pydantic.ValidationError as error:
            raise ValueError(f"experts {first_sentence(error)}") from error

    @pydantic.field_validator("log_probs")
    @classmethod
    def _one_each(cls, value: list[float], info: pydantic.ValidationInfo) -> list[float]:
        tokens = info.data.get("tokens", value)
        if len(value) != len(tokens):
            raise ValueError(f"must be one for each of the {len(tokens)} tokens, and there are {len(value)}")
        return value


class Group(Fields):
    """A prompt and its completions; ``engine`` names the layout of their experts."""

    prompt_tokens: _Tokens
    completions: Annotated[list[Completion], pydantic.Field(min_length=2)]
    engine: EngineName | None = None

    @pydantic.model_validator(mode="after")
    def _check_experts(self) -> Group:
        for i, completion in enumerate(self.completions):
            if (completion.experts is None) != (self.engine is None):
                what = "has none, and engine is set" if self.engine else "is given, and engine is not"
                raise ValueError(f"completions.{i}.experts {what}")
        return self


def document(fields: Mapping[str, Any]) -> str:
    """Make a document from a line or row; values may be JSON text. Raises ValueError for another form."""
    tree = {name: _parsed(name, value) if name in FIELDS else value for name, value in fields.items()}
    Group.model_validate(tree)
    return ROLLOUTS + dumps(tree, separators=(",", ":"))


def _parsed(name: str, value: Any) -> Any:
    try:
        return loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: is text that is not JSON ({error})") from error


def read(text: str) -> Group:
    """The rollouts of a document. Raises ValueError."""
    if not text.startswith(ROLLOUTS):
        raise ValueError("holds no rollouts")
    return Group.model_validate_json(text.removeprefix(ROLLOUTS))
