"""Files, streams, signals and messages of a process. Modules here know nothing of models."""
