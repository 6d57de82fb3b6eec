"""Teachers: exact, our own checkpoints, and others' models."""
