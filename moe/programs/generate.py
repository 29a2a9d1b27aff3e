"""Text from a model's newest checkpoint: moe generate --workdir=WORKDIR --prompt="Once upon".

A decoder-only model continues the prompt; an encoder-decoder reads it and writes a target; only the target is printed.
One that was trained by span corruption fills in blanks: --prompt="Once<extra_id_0> a<extra_id_1>."
Several --prompt run as one batch and are printed one after the other; with one, tokens are printed as they are chosen.
--chat answers in the tokenizer's chat template: each --prompt is a turn of one conversation; without any, the turns are
lines of standard input.
--rollouts=FILE.jsonl samples --samples completions of every prompt at temperature 1, scores them with --reward, a
function of (prompt, completion), and writes them with log-probabilities and experts, as moe train --config=policy reads
them; with --chat each prompt is a conversation of one turn.
--mesh splits the work, as in --mesh=data=1,expert=4,tensor=2; by default all devices hold rows, and split the model
only if it would fill more than half of the memory of one.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from absl import flags

from moe.programs import cli

_WORKDIR = cli.define_path("workdir", "Folder of a run or an import.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "Text to continue; may be given several times.")
_PROMPTS = cli.define_path("prompts", 'File of prompts for --rollouts: lines of JSON with "prompt", or of a .txt file.')
_ROLLOUTS = cli.define_path("rollouts", "File to write: scored completions for moe train --config=policy.")
_SAMPLES = flags.DEFINE_integer("samples", 8, "Completions of each prompt for --rollouts.", lower_bound=2)
_REWARD = flags.DEFINE_string("reward", None, "module:function of (prompt, completion) for --rollouts; a number.")
_CHAT = flags.DEFINE_bool("chat", False, "Talk: prompts are turns of a conversation, in the tokenizer's template.")
_SYSTEM = flags.DEFINE_string("system", None, "System message at the start of --chat.")
_TOKENS = flags.DEFINE_integer("tokens", 128, "Maximum number of new tokens.", lower_bound=1, upper_bound=2**17)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Temperature of the softmax; 0: the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from this many likeliest tokens; 0: from all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the fewest tokens that together have this probability.")
_STOP = flags.DEFINE_multi_integer("stop", [], "Token ids that end a text, besides the end-of-text token.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_SPECULATE = flags.DEFINE_bool("speculate", False, "Draft by multi-token prediction: the same text in fewer steps.")
_MESH = flags.DEFINE_list("mesh", [], "Devices per axis: data, fsdp, expert, tensor.")


def _start_token(workdir: str, pad_id: int, vocab_size: int) -> int:
    """First token of a decoder: the one that an import states, else the padding token."""
    from etils import epath

    from moe.config import ConfigError
    from moe.data.tokenizer_files import GENERATION_FILE
    from moe.system.sealed_folder import is_there, read_checked_object

    path = epath.Path(workdir) / GENERATION_FILE
    start: Any = read_checked_object(path).get("decoder_start_token_id") if is_there(path) else None
    if start is None:
        return max(pad_id, 0)
    if type(start) is not int or not 0 <= start < vocab_size:
        raise ConfigError(f"{path}: decoder_start_token_id={start!r}: must be a token from 0 to {vocab_size - 1}")
    return start


def _typed() -> Iterator[str]:
    """Lines of standard input, with a prompt before each on a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


class _Screen:
    """A growing text on standard output."""

    def __init__(self) -> None:
        self._shown = ""

    def show(self, text: str) -> None:
        """Print what is new, unless it ends in the middle of a character, which may take several tokens."""
        if not text.endswith("\ufffd"):
            print(text.removeprefix(self._shown), end="", flush=True)
            self._shown = text


def _talk(turns: Iterable[str], tokenizer: Any, answer: Callable[[list[int]], Iterable[Any]]) -> None:
    """Answer the turns of one conversation, each after all turns and answers before it."""
    from moe.data import chat

    messages = [{"role": "system", "content": _SYSTEM.value}] if _SYSTEM.value else []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids: list[int] = []
        screen = _Screen()
        for (token,) in answer(chat.prompt_ids(tokenizer, messages, date="").tolist()):
            ids += [int(token)] if token >= 0 else []
            screen.show(tokenizer.decode(ids))
        print(flush=True)
        messages.append({"role": "assistant", "content": tokenizer.decode(ids)})


def _mesh(config: Any) -> Any:
    """The mesh of --mesh, checked for the model of this config."""
    import jax

    from moe.config import ConfigError, MeshConfig, validate_mesh
    from moe.models import sampling
    from moe.parallel.mesh import make_mesh, parse_sizes

    sizes = parse_sizes(_MESH.value, remaining=True)
    mesh = make_mesh(MeshConfig(**sizes) if sizes else sampling.default_mesh(config.model, jax.devices()))
    if (context := mesh.shape.get("context", 1)) > 1:
        raise ConfigError(f"--mesh=context={context}: must be 1 to generate")
    validate_mesh(sampling.for_generation(config, mesh.size), mesh.shape)
    return mesh


def _options(config: Any, tokenizer: Any) -> Any:
    """Sampling options from the flags."""
    from moe.config import ConfigError
    from moe.data import chat
    from moe.models import sampling

    vocab_size = config.model.vocab_size
    if wrong := [number for number in _STOP.value or [] if not 0 <= number < vocab_size]:
        raise ConfigError(f"--stop={wrong[0]}: must be an id from 0 to {vocab_size - 1}")
    if _SPECULATE.value and _TEMPERATURE.value:
        raise ConfigError(f"--temperature={_TEMPERATURE.value}: must be 0 with --speculate")
    ends = chat.stop_ids(tokenizer) if _CHAT.value else (tokenizer.eos_id,)
    return sampling.Sampling(
        temperature=_TEMPERATURE.value or 0.0,
        top_k=_TOP_K.value or 0,
        top_p=_TOP_P.value or 0.0,
        stop_tokens=(*ends, *(_STOP.value or [])),
        seed=_SEED.value or 0,
        start_token=_start_token(str(_WORKDIR.value), tokenizer.pad_id, vocab_size),
        prefix=config.objective.prefix,
    )


class _Texts:
    """Tokens of the prompts, and the text to print for each.

    Attributes:
        prompts: as given.
        rows: tokens of each: the beginning of a decoder's text, or the input of an encoder-decoder.
        reads: whether the model is an encoder-decoder, which reads the prompt instead of continuing it.
    """

    def __init__(self, prompts: Sequence[str], config: Any, tokenizer: Any):
        from moe.data.sentinels import decode_blanks, encode_blanks

        self.prompts, self.reads = prompts, config.model.encoder_layers > 0
        start = [tokenizer.bos_id] if tokenizer.bos_id >= 0 and not self.reads else []
        end = [tokenizer.eos_id] * self.reads
        count = config.objective.sentinels
        encode = functools.partial(encode_blanks, tokenizer, count=count) if count else tokenizer.encode
        self._decode = functools.partial(decode_blanks, tokenizer, count=count) if count else tokenizer.decode
        self.rows: list[list[int]] = [start + encode(prompt).tolist() + end for prompt in prompts]

    def shown(self, index: int) -> str:
        """Text to print before the output for a prompt."""
        return "" if self.reads else self.prompts[index]

    def written(self, index: int, text: list[int]) -> str:
        """Text of the output tokens for a prompt."""
        row = self.rows[index]
        return self._decode(text) if self.reads else self._decode(row + text).removeprefix(self._decode(row))


def _write(texts: _Texts, columns: Iterable[Any]) -> None:
    """Print one text token by token, or several texts when all are complete; then the speed on stderr."""
    import numpy as np

    found: list[list[int]] = [[] for _ in texts.rows]
    alone = len(found) == 1
    screen = _Screen()
    times = list[float]()
    if alone:
        print(texts.shown(0), end="", flush=True)
    for column in columns:
        times.append(time.perf_counter())
        for text, token in zip(found, column, strict=True):
            if token >= 0:
                text.append(int(token))
        if alone:
            screen.show(texts.written(0, found[0]))
    for index, text in enumerate(found):
        if not alone:
            print(f"{texts.shown(index)}{texts.written(index, text)}\n---")
    print(file=sys.stderr)
    if len(times) > 2:
        # The second token waits for the compiler.
        rate = np.sum([len(text) - 2 for text in found if len(text) > 2]) / (times[-1] - times[1])
        print(f"{rate:,.1f} tokens/s over {len(found)} rows", file=sys.stderr)


def _roll_out(config: Any, tokenizer: Any, prompts: Sequence[str], variables: dict[str, Any]) -> None:
    """Sample completions of the prompts, score them and write them."""
    import numpy as np

    from moe.config.references import import_object
    from moe.data import chat
    from moe.models.sampling import make_sampler
    from moe.objectives import sampling as rollouts

    reward = import_object("reward", str(_REWARD.value))
    start = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []

    def ids(prompt: str) -> list[int]:
        if _CHAT.value:
            return chat.prompt_ids(tokenizer, [{"role": "user", "content": prompt}], date="").tolist()
        return start + tokenizer.encode(prompt).tolist()

    rows = [ids(prompt) for prompt in prompts]
    task = rollouts.TextTask(tokenizer, reward, dict(zip(map(tuple, rows), prompts, strict=True)))
    ends = chat.stop_ids(tokenizer) if _CHAT.value else (tokenizer.eos_id,)
    sampler = make_sampler(config.model, int(_TOKENS.value or 0), (*ends, *(_STOP.value or [])))
    samples, seed = int(_SAMPLES.value or 0), int(_SEED.value or 0)
    groups = list(rollouts.sample_groups(sampler, variables, rows, task, samples, seed))
    rollouts.write_groups(str(_ROLLOUTS.value), groups)
    rewards = np.asarray([[one.reward for one in group.completions] for group in groups])
    print(
        f"{_ROLLOUTS.value}: {len(groups)} prompts, {samples} completions of each; mean reward {rewards.mean():.3g}, "
        f"{np.mean(np.ptp(rewards, axis=1) > 0):.0%} of the prompts with different rewards"
    )


def _prompts() -> list[str]:
    """Prompts of the flags, checked with the flags that read them."""
    from moe.config import ConfigError
    from moe.objectives.sampling import read_prompts

    prompts = list(_PROMPT.value or [])
    cli.only_with(_ROLLOUTS.value is not None, "is read only with --rollouts", _PROMPTS, _SAMPLES, _REWARD)
    if _ROLLOUTS.value is not None:
        reason = "is not read with --rollouts, which samples at temperature 1"
        cli.only_with(False, reason, _TEMPERATURE, _TOP_K, _TOP_P, _SPECULATE, _SYSTEM)
        if _REWARD.value is None:
            raise ConfigError("--reward is needed with --rollouts: module:function of (prompt, completion)")
        prompts += read_prompts(str(_PROMPTS.value)) if _PROMPTS.value else []
        if not prompts:
            raise ConfigError("--prompts=FILE or --prompt is needed with --rollouts")
    elif not prompts and not _CHAT.value:
        raise ConfigError("--prompt is needed, or --chat to talk; --help shows examples")
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ConfigError(f"--prompt={prompt!r}: must be UTF-8")
    return prompts


def main() -> None:
    """Flags in, text out; speed on stderr."""
    import jax

    from moe.checkpoints import parameters
    from moe.checkpoints.workdir import read_config
    from moe.data.tokenizer_files import find_tokenizer
    from moe.models import sampling, speculation
    from moe.objectives.sampling import check

    workdir, prompts = str(_WORKDIR.value), _prompts()
    cli.only_with(bool(_CHAT.value), "is read only with --chat", _SYSTEM)
    cli.only_with(not _CHAT.value, "is not read with --chat", _SPECULATE)
    config = read_config(workdir)
    if _ROLLOUTS.value is not None:
        check(config.model, str(_ROLLOUTS.value), int(_SAMPLES.value or 0))
    tokenizer = find_tokenizer(workdir, chat=bool(_CHAT.value))
    mesh = _mesh(config)
    options = _options(config, tokenizer)
    limit = int(_TOKENS.value or 0)
    texts = _Texts(prompts, config, tokenizer)
    with jax.set_mesh(mesh):
        variables = parameters.read_variables(workdir, config.model, mesh=mesh, step=_STEP.value)
        if _ROLLOUTS.value is not None:
            _roll_out(config, tokenizer, prompts, variables)
        elif _CHAT.value:
            stream = functools.partial(sampling.stream, config.model, variables)
            _talk(prompts or _typed(), tokenizer, lambda row: stream([row], limit, options))
        elif _SPECULATE.value:
            found = speculation.sample(
                config.model, variables, texts.rows, limit, options.stop_tokens, prefix=options.prefix
            )
            for index, text in enumerate(found.texts):
                print(f"{prompts[index]}{texts.written(index, text.tolist())}" + "\n---" * (len(prompts) > 1))
            print(f"{found.steps} steps; {found.accepted:.0%} of the drafts confirmed", file=sys.stderr)
        else:
            _write(texts, sampling.stream(config.model, variables, texts.rows, limit, options))


def run() -> None:
    """The program."""
    cli.run(
        main,
        required=("workdir",),
        examples=(
            'moe generate --workdir=/tmp/quickstart --prompt="Once upon a time"',
            'moe generate --workdir=/tmp/quickstart --prompt="def " --tokens=64 --temperature=0',
            "moe generate --workdir=/tmp/chat --chat",
            "moe generate --workdir=/tmp/chat --chat --prompts=p.jsonl --reward=mine:score --rollouts=/tmp/r/a.jsonl",
            'moe generate --workdir=/tmp/mtp --prompt="def " --temperature=0 --speculate',
        ),
    )
