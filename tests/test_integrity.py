"""Checksums see every change of the values, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from boot_jax import sharding
from boot_jax.training import integrity

RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(16, 8, 4)).astype(np.float32)


def checksum(array) -> int:
    return integrity.describe({"a": jnp.asarray(array)})["a"]["checksum"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "uint8"])
def test_a_checksum_depends_on_the_values_alone(dtype):
    values = jnp.asarray(VALUES * 10, dtype)
    again = jnp.asarray(np.asarray(values).copy())
    assert checksum(values) == checksum(again)
    mesh = sharding.create_mesh(2, 4)
    for spec in (("data",), (None, "fsdp"), (("data", "fsdp"), None, None), ()):
        split = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))
        assert checksum(split) == checksum(values)


def test_a_checksum_sees_one_bit_anywhere():
    whole, seen = checksum(VALUES), set()
    for index in RNG.integers(0, VALUES.size, 40):
        bits = VALUES.copy().reshape(-1).view(np.uint32)
        bits[index] ^= np.uint32(1) << np.uint32(RNG.integers(0, 22))
        seen.add(checksum(bits.view(np.float32).reshape(VALUES.shape)))
    assert whole not in seen and len(seen) >= 39


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v[::-1],
        lambda v: np.swapaxes(v, 0, 1).reshape(v.shape),
        lambda v: np.where(np.arange(4) == 1, 0, v),
        np.zeros_like,
        lambda v: -v,
    ],
)
def test_a_checksum_sees_order_and_zeros(change):
    assert checksum(change(VALUES).astype(np.float32)) != checksum(VALUES)


def test_zeros_of_other_lengths_differ():
    assert checksum(np.zeros(4, np.float32)) != checksum(np.zeros(5, np.float32))


def test_what_is_described():
    tree = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": (jnp.asarray(3, jnp.int32),)}
    described = integrity.describe(tree)
    assert set(described) == {"a", "b/0"}
    assert described["a"]["shape"] == [2, 3] and described["a"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(bad):
    tree = {
        "good": jnp.ones(3),
        "worse": {"kernel": jnp.ones((2, 2)).at[1, 0].set(bad)},
    }
    with pytest.raises(FloatingPointError, match="worse/kernel would hold NaN"):
        integrity.describe(tree)


def test_misfits_are_named():
    saved = integrity.describe(
        {"a": jnp.zeros(3), "b": jnp.zeros(2), "c": jnp.zeros(1)}
    )
    template = {"a": jnp.zeros(4), "b": jnp.zeros(2), "d": jnp.zeros(1)}
    assert integrity.misfits(saved, template) == [
        "it lacks d",
        "it has c",
        "a is float32[3], not float32[4]",
    ]
    assert not integrity.misfits(
        saved, {name: jnp.zeros(n) for name, n in zip("abc", (3, 2, 1), strict=True)}
    )
