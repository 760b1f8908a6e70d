"""The testbed: a synthetic task with exact labels, and the two small models trained on it."""
