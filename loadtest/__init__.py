"""Benchmarks that anyone can run: ratios against a baseline in the same run, never absolute promises."""
