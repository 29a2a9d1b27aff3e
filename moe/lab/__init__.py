"""The ablation lab: suites of runs, their statistics, and the report."""
