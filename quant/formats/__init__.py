"""Readers, one file a format. Every offset, count and size is checked against the file before use."""
