"""Pretraining: a small model taught from nothing, from its corpus to the folder that it becomes."""
