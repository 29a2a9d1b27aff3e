"""What the experts of a checkpoint learnt: routing over held-out text, as numbers, tables, plots and coloured text."""
