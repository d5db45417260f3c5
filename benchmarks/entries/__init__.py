"""Benchmarks by topic: each module here ends in BENCHMARKS, a tuple of `registry.Benchmark`, and imports nothing heavy before one runs."""
