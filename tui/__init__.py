"""The terminal chat. Installed and imported as `edger1.tui`."""
