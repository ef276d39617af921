"""Measure this project against the obvious alternatives, in one run: ``python -m benchmarks``."""
