"""Tasks whose answers are known."""
