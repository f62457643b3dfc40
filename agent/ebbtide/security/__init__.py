"""Who we are, whom we trust, and how keys rest on disk."""
