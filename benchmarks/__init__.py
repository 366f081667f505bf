"""Benchmarks: EdgeR1 and a peer measured in one run on the same weights, with the ratio. See README.md in this folder."""
