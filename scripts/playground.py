"""A page that runs a small MoE in the browser: python scripts/playground.py --workdir=RUN --output=page.html.

The program is moe/programs/playground.py, also installed as the command moe-playground.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("playground")
