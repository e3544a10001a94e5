"""What a decomposition says: everything here reads a run directory and never the trainer."""
