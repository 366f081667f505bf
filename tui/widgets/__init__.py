"""The chat's widgets: one file each, with its own style, keys and messages."""
