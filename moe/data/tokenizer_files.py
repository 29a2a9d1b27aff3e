"""Reading of tokenizers: from a file, a workdir, or the package that contains Mixtral's."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

from etils import epath

from moe.config import ConfigError
from moe.data.json_tokenizer import JSON_CONFIG_FILE, JSON_FILE, TEMPLATE_FILE, JsonTokenizer
from moe.data.tokenizer import Tokenizer
from moe.data.wheels import MISTRAL_COMMON, fetch_wheel
from moe.system.sealed_folder import is_there, read_checked

SENTENCEPIECE_FILE = "tokenizer.model"
T5_FILE = "spiece.model"  # also SentencePiece, as named beside T5's checkpoints
_VOCABULARIES = (SENTENCEPIECE_FILE, JSON_FILE, T5_FILE)
#: Files of a workdir from which its tokenizer is read.
TOKENIZER_FILES = (*_VOCABULARIES, JSON_CONFIG_FILE, TEMPLATE_FILE)
GENERATION_FILE = "generation_config.json"
#: Files that are copied with a model's weights: the tokenizer, and how generation ends.
COMPANIONS = (*TOKENIZER_FILES, "tiktoken.model", "special_tokens_map.json", "added_tokens.json", GENERATION_FILE)
#: Value of ``data.tokenizer`` that names no file.
MIXTRAL = "mixtral"
_MIXTRAL_MODEL = "mistral_common/data/tokenizer.model.v1"


def read_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a SentencePiece model or a ``tokenizer.json``, local or in a bucket.

    Raises:
      ConfigError: no such file, or it is neither.
    """
    file = epath.Path(path).expanduser()
    if file.suffix != ".json":
        return Tokenizer.from_file(file)
    name = f"data.tokenizer={os.fspath(path)!r}"
    settings, template = (
        read_checked(file.parent / beside) if is_there(file.parent / beside) else None
        for beside in (JSON_CONFIG_FILE, TEMPLATE_FILE)
    )
    return JsonTokenizer(read_checked(file, name), settings, name, template)


def find_tokenizer(workdir: str | os.PathLike[str], *, chat: bool = False) -> Tokenizer:
    """Read the tokenizer of a run or an import from its workdir; for chat, prefer tokenizer.json.

    Raises:
      ConfigError: the workdir has none, or lacks one that it was written with.
    """
    for name in (JSON_FILE, *_VOCABULARIES) if chat else _VOCABULARIES:
        if is_there(epath.Path(workdir) / name):
            return read_tokenizer(epath.Path(workdir) / name)
    raise ConfigError(
        f"{os.fspath(workdir)}: has neither {SENTENCEPIECE_FILE}, {JSON_FILE} nor {T5_FILE}; copy one there"
    )


def companions(workdir: str | os.PathLike[str]) -> dict[str, bytes]:
    """Contents of the :data:`COMPANIONS` that a folder has. Raises ConfigError for one that cannot be read, or was
    there when the folder was written."""
    folder = epath.Path(workdir)
    return {name: read_checked(folder / name) for name in COMPANIONS if is_there(folder / name)}


def named_tokenizer(name: str, directory: epath.Path, progress: Callable[[str], None]) -> Tokenizer:
    """Open ``data.tokenizer``: "mixtral" (Mixtral's 32,000 tokens, fetched once) or a file."""
    if name != MIXTRAL:
        return read_tokenizer(name)
    wheel = fetch_wheel(MISTRAL_COMMON, Path(directory) / "downloads", progress)
    with zipfile.ZipFile(wheel) as archive:
        return Tokenizer.from_bytes(archive.read(_MIXTRAL_MODEL))
