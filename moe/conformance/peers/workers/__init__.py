"""Programs that run in other libraries' environments; nothing here imports this project or is imported by it."""
