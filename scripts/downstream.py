"""Run tasks of lm-evaluation-harness on a workdir: python scripts/downstream.py.

The program is moe/programs/downstream.py, also the command moe downstream.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("downstream")
