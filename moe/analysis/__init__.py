"""Routing of checkpoints over held-out text: measures, tables, plots and coloured text."""
