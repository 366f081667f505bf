"""Where drafts come from, how many of them are worth verifying, and which are accepted; see `edger1.speculate`."""
