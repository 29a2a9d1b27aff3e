"""What the benchmarks in scripts/ time, and how."""
