"""Settings of runs: each file has get_config(); base.py lists every default, the others override."""
