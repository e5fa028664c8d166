"""What the calls of all pipelines have in common: their signatures, and what callbacks get."""
