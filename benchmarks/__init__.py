"""Benchmarks: EdgeR1 and a peer measured in one run on the same weights. README.md here tells how."""
