"""Where routed experts live and who computes them."""
