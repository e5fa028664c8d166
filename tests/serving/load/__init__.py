"""Load and soak tests of a real `t2i serve` process: python -m tests.serving.load --help."""
