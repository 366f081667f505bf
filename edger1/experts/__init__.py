"""Routed experts on disk, some of them in memory: mixture-of-experts models larger than memory."""
