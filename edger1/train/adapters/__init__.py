"""Low-rank adapters: over a live model, in files, and fused into weights."""
