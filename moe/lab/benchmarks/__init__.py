"""Programs that the benchmarks in scripts/ time, and the timing itself."""
