"""Claims of the papers: registered before the runs, decided on their records."""
