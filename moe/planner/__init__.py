"""Planning a pod run on a machine without one: compile the real train step ahead of time, and read what came out."""
