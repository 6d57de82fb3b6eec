"""Low-rank adapters against formulas written out, and the memory that they take."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from boot_jax.auxiliary import create_auxiliary
from boot_jax.models import create_network
from boot_jax.models.lora import init_adapters, merge_adapters
from boot_jax.schedules import get_schedule
from boot_jax.teachers.base import Teacher, TeacherError, network_denoiser
from boot_jax.teachers.mixture import gaussian_mixture
from boot_jax.training.auxiliary import auxiliary_optimizer

COSINE = get_schedule("cosine")
SHAPE = (4, 4, 1)


class Net(nn.Module):
    """A convolution and a dense layer."""

    added_embeddings: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: Any, time: Any, condition: Any = None, added: Any = None):
        told = time / 1000
        for name in self.added_embeddings:
            init = nn.initializers.zeros_init()
            told = told + self.param(f"added_{name}", init, ()) * (added or {})[name]
        h = jnp.tanh(nn.Conv(8, (3, 3), name="conv")(x + told[:, None, None, None]))
        return nn.Dense(1, name="last")(h)


@pytest.fixture(scope="module")
def teacher():
    network = Net()
    x = jnp.ones((2, *SHAPE))
    params = network.init(jax.random.key(0), x, jnp.zeros((2,)))["params"]
    return Teacher(
        denoise=network_denoiser(network, COSINE, "v_prediction"),
        params=params,
        schedule=COSINE,
        sample_shape=SHAPE,
        network=network,
        prediction_type="v_prediction",
    )


def inputs() -> Any:
    x = jax.random.normal(jax.random.key(1), (2, *SHAPE))
    return x, jnp.asarray([0.3, 0.8])


def test_adapters_are_low_rank_and_start_as_nothing(teacher):
    adapters = init_adapters(teacher.params, jax.random.key(2), rank=3)
    shapes = jax.tree.map(jnp.shape, adapters)
    assert shapes == {
        "conv": {"lora_down": (9, 3), "lora_up": (3, 8)},
        # A kernel of one output has no higher rank.
        "last": {"lora_down": (8, 1), "lora_up": (1, 1)},
    }
    merged = merge_adapters(teacher.params, adapters)
    jax.tree.map(np.testing.assert_array_equal, merged, teacher.params)


def test_what_is_added_is_their_product(teacher):
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        init_adapters(teacher.params, jax.random.key(2), rank=3),
    )
    merged = merge_adapters(teacher.params, adapters, scale=0.5)
    own = adapters["conv"]
    change = 0.5 * np.asarray(own["lora_down"]) @ np.asarray(own["lora_up"])
    kernel = np.asarray(teacher.params["conv"]["kernel"])
    np.testing.assert_allclose(
        merged["conv"]["kernel"], kernel + change.reshape(3, 3, 1, 8), rtol=1e-5
    )
    np.testing.assert_array_equal(
        merged["conv"]["bias"], teacher.params["conv"]["bias"]
    )
    # A teacher in 16 bits is not what small changes are lost in.
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), teacher.params)
    small = jax.tree.map(lambda leaf: 1e-2 * leaf, adapters)
    moved = merge_adapters(half, small)["conv"]["kernel"]
    assert moved.dtype == jnp.float32
    assert (moved != half["conv"]["kernel"].astype(jnp.float32)).all()


@pytest.mark.parametrize("rank", [0, 2])
def test_the_auxiliary_network_starts_as_the_teacher(teacher, rank):
    auxiliary = create_auxiliary(teacher, lora_rank=rank)
    trained = auxiliary.init(jax.random.key(3))
    params = auxiliary.complete(trained, teacher.params)
    np.testing.assert_allclose(
        auxiliary.denoise(params, *inputs(), None),
        teacher.denoise(teacher.params, *inputs(), None),
        rtol=1e-6,
    )


def test_it_is_told_the_guidance_scale_that_the_student_is_told(teacher):
    for rank in (0, 2):
        auxiliary = create_auxiliary(teacher, guidance_range=(1.0, 3.0), lora_rank=rank)
        trained = auxiliary.init(jax.random.key(3))

        def apply(trained: Any, scale: float, made: Any = auxiliary) -> Any:
            params = made.complete(trained, teacher.params)
            told = {"guidance_scale": jnp.full((2,), scale)}
            return made.denoise(params, *inputs(), told)

        start = teacher.denoise(teacher.params, *inputs(), None)
        np.testing.assert_allclose(apply(trained, 2.0), start, rtol=1e-6)
        slope = jax.grad(lambda trained: jnp.sum(apply(trained, 2.0)))(trained)
        moved = jax.tree.map(lambda leaf, s: leaf + 0.1 * s, trained, slope)
        assert (np.asarray(apply(moved, 1.0)) != apply(moved, 3.0)).any()


def test_gradients_reach_the_adapters_alone(teacher):
    auxiliary = create_auxiliary(teacher, lora_rank=2)
    trained = auxiliary.init(jax.random.key(3))
    assert set(trained) == {"adapters", "added"} and not trained["added"]

    def loss(trained: Any) -> Any:
        params = auxiliary.complete(trained, teacher.params)
        return jnp.sum(auxiliary.denoise(params, *inputs(), None) ** 2)

    slope = jax.grad(loss)(trained)
    # Where B is zero, A has no gradient yet.
    for own in slope["adapters"].values():
        assert np.asarray(own["lora_up"]).any()
        assert not np.asarray(own["lora_down"]).any()
    shapes = jax.eval_shape(auxiliary_optimizer(1e-3, 0.0, 0.99).init, trained)
    sizes = {leaf.shape for leaf in jax.tree.leaves(shapes) if leaf.shape}
    assert sizes == {leaf.shape for leaf in jax.tree.leaves(trained)}


def test_a_teacher_without_weights_has_nothing_to_adapt():
    exact = gaussian_mixture(jnp.zeros((1, *SHAPE)), [1.0], COSINE)
    with pytest.raises(TeacherError, match="no network that an auxiliary one"):
        create_auxiliary(exact)
    with pytest.raises(TeacherError, match="lora_rank=0"):
        create_auxiliary(exact, network=Net(), lora_rank=4)


@pytest.mark.parametrize(
    "name, options",
    [
        (
            "dit",
            {"patch_size": 2, "hidden_size": 1152, "num_layers": 28, "num_heads": 16},
        ),
        (
            "unet",
            {
                "block_out_channels": (128, 256, 384, 512),
                "down_block_types": ("DownBlock2D",) + 3 * ("AttnDownBlock2D",),
                "up_block_types": 3 * ("AttnUpBlock2D",) + ("UpBlock2D",),
            },
        ),
    ],
)
def test_adapters_take_little_memory(name, options):
    """At the size of DiT-XL, and of a UNet of 64 x 64: parameters and optimizer."""
    shape = (32, 32, 4)
    network = create_network(name, sample_shape=shape, **options)
    params = jax.eval_shape(
        lambda: network.init(
            jax.random.key(0), jnp.zeros((1, *shape)), jnp.zeros((1,))
        )["params"]
    )

    def held(trained: Any) -> int:
        moments = jax.eval_shape(auxiliary_optimizer(5e-4, 0.0, 0.99).init, trained)
        return sum(leaf.size for leaf in jax.tree.leaves((trained, moments)))

    adapters = jax.eval_shape(lambda: init_adapters(params, jax.random.key(0), rank=16))
    share = held(adapters) / held(params)
    print(f"{name}: adapters take {share:.1%} of the whole network's memory")
    assert share < 0.15


@pytest.mark.parametrize("b1", [0.0, 0.5])
def test_the_optimizer_is_adam(b1):
    ours, theirs = auxiliary_optimizer(0.1, b1, 0.99), optax.adam(0.1, b1=b1, b2=0.99)
    params = jnp.asarray([1.0, -2.0])
    states = [ours.init(params), theirs.init(params)]
    for gradient in ([3.0, -0.1], [1.0, 2.0], [-4.0, 0.5]):
        with jax.numpy_dtype_promotion("standard"):
            given = jnp.asarray(gradient)
            first, states[0] = ours.update(given, states[0], params)
            second, states[1] = theirs.update(given, states[1], params)
        np.testing.assert_allclose(first, second, rtol=1e-5)
    # Without momentum there is one moment less.
    moments = [sum(leaf.size for leaf in jax.tree.leaves(s)) for s in states]
    assert moments[0] == moments[1] - (0 if b1 else 2)
