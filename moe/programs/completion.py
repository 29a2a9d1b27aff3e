"""Tab completion of moe and moe-train, moe-plan, ...: their options, and names of configs.

Put a line of the examples into the start file of your shell, such as ~/.bashrc. Options are read from a command's
--help when Tab is pressed.
"""

import importlib.metadata
import sys

from moe.programs.commands import COMMANDS
from moe.programs.help_text import without_flags
from moe.system import process

_BASH = """_moe() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command=${COMP_WORDS[1]} options
    [ "$word" = "=" ] && word=
    [ "$before" = "=" ] && before=${COMP_WORDS[COMP_CWORD-2]}
    case "${COMP_WORDS[0]}" in *moe-*) command=${COMP_WORDS[0]##*moe-} ;; esac
    if [ "$COMP_CWORD" -eq 1 ] && [ "$command" = "${COMP_WORDS[1]}" ]; then
        COMPREPLY=($(compgen -W "COMMANDS" -- "$word"))
    elif [ "$before" = --config ] || [ "$before" = --suite ] || [ "$command" = configs ]; then
        COMPREPLY=($(compgen -W "$(moe configs --names 2>/dev/null)" -- "$word") $(compgen -f -- "$word"))
    elif [ "${word#-}" != "$word" ]; then
        options=$(moe "$command" --help 2>/dev/null | sed -n 's/^  \\(--[a-z_]*=\\{0,1\\}\\).*/\\1/p')
        COMPREPLY=($(compgen -W "$options" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}
complete -o nospace -F _moe PROGRAMS
"""
_FISH = """complete -c moe -n __fish_use_subcommand -f -a "COMMANDS"
set -l options "--help 2>/dev/null | string match -r -- '--[a-z_]+=?'"
set -l configs "--config=(moe configs --names 2>/dev/null | string split ' ')"
complete -c moe -n "not __fish_use_subcommand" -a "(moe (commandline -opc)[2] $options)"
for program in PROGRAMS
    test $program != moe; and complete -c $program -a "(moe (string replace moe- '' $program) $options)"
    complete -c $program -n "not __fish_use_subcommand" -a "$configs"
end
"""
_EXAMPLES = ('eval "$(moe completion bash)"', 'eval "$(moe completion zsh)"', "moe completion fish | source")
SHELLS = {"bash": _BASH, "zsh": f"autoload -U +X bashcompinit && bashcompinit\n{_BASH}", "fish": _FISH}


def run() -> None:
    """The program."""
    with process.closed_output_exits():
        print(_text(sys.argv[1:]), flush=True)


def _text(arguments: list[str]) -> str:
    """Help, or the completion of a shell. Exits where no shell is named."""
    if {"--help", "-h"} & {*arguments}:
        return without_flags(__doc__ or "", [("SHELL", f"{', '.join(SHELLS)}.")], _EXAMPLES)
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        sys.exit(f"error: moe completion takes one word of {', '.join(SHELLS)}, as in {_EXAMPLES[0]}")
    programs = [program.name for program in importlib.metadata.distribution("moe-jax").entry_points]
    text = SHELLS[arguments[0]].replace("PROGRAMS", " ".join(programs))
    return text.replace("COMMANDS", " ".join(COMMANDS)).rstrip("\n")
