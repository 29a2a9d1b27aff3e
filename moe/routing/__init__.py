"""Gates, the router, and load balancing: logits to experts and weights."""
