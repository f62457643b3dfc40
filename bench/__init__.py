"""Benchmarks: our side and the peers' in turn, medians, and the spread beside them."""
