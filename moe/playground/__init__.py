"""A page that runs a small MoE in the browser, with its routing to see and to change; made of any small run."""
