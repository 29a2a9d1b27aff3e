"""Memory, exchanges and time of an absent pod: python scripts/plan_pod.py --config=CONFIG --topology=v5p-128.

The program is moe/programs/plan_pod.py, also installed as the command moe-plan.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("plan_pod")
