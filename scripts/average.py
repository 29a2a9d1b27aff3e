"""Average a run's checkpoints into a workdir: python scripts/average.py.

The program is moe/programs/average.py, also the command moe average.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("average")
