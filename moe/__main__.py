"""``python -m moe COMMAND``."""

from moe.commands import main

if __name__ == "__main__":
    main()
