"""Stand-in for a package that sglang imports for its notebooks alone."""
