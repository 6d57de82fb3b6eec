"""Meshes over some of the CPU's devices."""

import jax
from jax.sharding import AxisType, Mesh

from boot_jax.sharding import AXES


def mesh_of(count: int) -> Mesh:
    """The first ``count`` devices, all on the data axis."""
    kinds = (AxisType.Auto,) * 3
    devices = jax.devices()[:count]
    return jax.make_mesh((count, 1, 1), AXES, axis_types=kinds, devices=devices)
