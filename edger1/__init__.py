"""EdgeR1: run, reason with and train open-weight reasoning models on the computer you own."""

__version__ = "0.1.0"
