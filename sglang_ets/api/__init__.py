"""The HTTP process: what a client may send, and what it gets back."""
