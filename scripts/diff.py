"""Where two runs route, and predict, differently: python scripts/diff.py --workdir=RUN_A --other=RUN_B.

The program is moe/programs/diff.py, which is the command moe-diff too.
"""

from moe.commands import start

if __name__ == "__main__":
    start("diff")
