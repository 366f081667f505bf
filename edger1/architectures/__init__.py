"""Architectures of which mlx-lm lacks a part, in the shape of its own: args, modules, sanitize."""
