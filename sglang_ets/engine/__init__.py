"""The scheduler process: searches as sglang requests."""
