"""Train or resume: python main.py --config=configs/quickstart.py --workdir=DIR [--config.x.y=value ...].

The program is moe/programs/train.py, which is the command moe-train too.
"""

from moe.programs.commands import start

if __name__ == "__main__":
    start("train")
