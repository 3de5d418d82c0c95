"""Which models there are, how they are loaded, and whether they fit into memory."""
