"""Two runs of one model on one text: the first choice that differs, and whether rounding suffices to explain it."""
