"""python scripts/analyze_routing.py --workdir=WORKDIR: analyses the routing of a run's or an import's checkpoint.

The program is moe/programs/analyze_routing.py, also installed as the command moe-analyze.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("analyze_routing")
