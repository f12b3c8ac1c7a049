"""Named training runs as data, and what carries one out from its description to a model folder."""
