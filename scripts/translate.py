"""Score translations of a run on pairs: python scripts/translate.py.

The program is moe/programs/translate.py, also the command moe translate.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("translate")
