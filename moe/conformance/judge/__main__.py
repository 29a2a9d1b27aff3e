"""The judge without a training framework: python -m moe_conform layer.npz --rule=mixtral --k=4"""

from __future__ import annotations

import argparse
import sys
import zipfile

import numpy as np

from .checking import check
from .errors import InputError
from .named_rules import RULES, find_rule


def main() -> None:
    """Print the diagnosis; exit with 1 where the layer does not conform or the file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m moe_conform", description="Compare a recorded MoE layer.")
    parser.add_argument("npz", help="file of weights, inputs and results")
    parser.add_argument("--rule", default="mixtral", help=f"one of {', '.join(RULES)}")
    parser.add_argument("--k", type=int, help="experts per token; default: the rule's")
    parser.add_argument("--capacity_factor", type=float, help="default: the rule's")
    given = parser.parse_args()
    changes = {name: getattr(given, name) for name in ("k", "capacity_factor") if getattr(given, name) is not None}
    try:
        with np.load(given.npz, allow_pickle=False) as archive:
            arrays = dict(archive)
        check(arrays, given.rule, **changes)
    except AssertionError as difference:
        print(difference)
        sys.exit(1)
    except (InputError, OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"error: {given.npz}: {error}")
    print(f"rule: {find_rule(given.rule, **changes)}\n\nconforms")


if __name__ == "__main__":
    main()
