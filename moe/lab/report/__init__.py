"""Reports of suites and of claims: Markdown and pictures, from records alone."""
