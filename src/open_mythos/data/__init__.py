"""What models learn from: text, and tasks whose answers are known."""
