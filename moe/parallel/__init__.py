"""Device mesh, PartitionSpecs, parameter gathering, and the target hardware."""
