"""Tab completion of commands, options and names: eval "$(moe completion bash)" in a shell's start file.

Also for zsh; for fish, moe completion fish | source. Options are read from a command's --help when Tab is pressed.
"""

import sys

from moe.programs.commands import COMMANDS

_BASH = """_moe() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} options
    [ "$word" = "=" ] && word=
    [ "$before" = "=" ] && before=${COMP_WORDS[COMP_CWORD-2]}
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "COMMANDS" -- "$word"))
    elif [ "$before" = --config ] || [ "$before" = --suite ] || [ "${COMP_WORDS[1]}" = configs ]; then
        COMPREPLY=($(compgen -W "$(moe configs --names 2>/dev/null)" -- "$word") $(compgen -f -- "$word"))
    elif [ "${word#-}" != "$word" ]; then
        options=$(moe "${COMP_WORDS[1]}" --help 2>/dev/null | sed -n 's/^  \\(--[a-z_]*=\\{0,1\\}\\).*/\\1/p')
        COMPREPLY=($(compgen -W "$options" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}
complete -o nospace -F _moe moe
"""
_FISH = """complete -c moe -n __fish_use_subcommand -f -a "COMMANDS"
complete -c moe -n "not __fish_use_subcommand" -a "(moe (commandline -opc)[2] --help 2>/dev/null | string match -r -- '--[a-z_]+=?')"
complete -c moe -n "not __fish_use_subcommand" -a "--config=(moe configs --names 2>/dev/null)"
"""  # noqa: E501
SHELLS = {"bash": _BASH, "zsh": f"autoload -U +X bashcompinit && bashcompinit\n{_BASH}", "fish": _FISH}


def run() -> None:
    """The program."""
    arguments = sys.argv[1:]
    if {"--help", "-h"} & {*arguments}:
        print(f"{__doc__}\nusage: moe completion {'|'.join(SHELLS)}")
    elif len(arguments) == 1 and arguments[0] in SHELLS:
        print(SHELLS[arguments[0]].replace("COMMANDS", " ".join(COMMANDS)), end="")
    else:
        sys.exit(f"error: usage: moe completion {'|'.join(SHELLS)}")
