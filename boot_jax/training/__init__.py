"""A run: state, step, loop, checkpoints and logs."""
