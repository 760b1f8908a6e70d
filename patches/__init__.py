"""The patch set."""
