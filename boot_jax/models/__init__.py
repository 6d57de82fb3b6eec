"""Networks: Flax Linen, NHWC, driven by configs."""
