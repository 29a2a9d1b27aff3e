"""Programs: flags in, a call, lines out."""
