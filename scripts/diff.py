"""Where two runs route, and predict, differently: python scripts/diff.py --workdir=RUN_A --other=RUN_B.

The program is moe/programs/diff.py, also installed as the command moe-diff.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("diff")
