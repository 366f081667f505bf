"""Streaming: routed experts stay on disk, and a bank of slots a layer holds some of them in memory."""
