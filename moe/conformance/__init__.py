"""The MoE layer against the equations of the papers: a per-token oracle, cases, rows of the table."""
