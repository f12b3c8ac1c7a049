"""Training: depth plans, losses, the loop."""
