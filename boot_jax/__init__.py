"""Data-free distillation of diffusion models into one-step generators."""
