"""python scripts/generate.py --workdir=WORKDIR --prompt="Once upon": text from its newest checkpoint.

The program is moe/programs/generate.py, also installed as the command moe-generate.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("generate")
