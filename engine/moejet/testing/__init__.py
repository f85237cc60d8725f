"""Shared by tests and benchmarks: tolerances, tiny random checkpoints, the arithmetic task of the embedded reasoner."""
