"""Teacher training: the denoising loss, for every schedule and prediction type."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from boot_jax.conditions import Conditions
from boot_jax.models import create_network
from boot_jax.prediction import PREDICTION_TYPES
from boot_jax.schedules import get_schedule
from boot_jax.teachers.checkpoint import initialiser
from boot_jax.teachers.mixture import gaussian_mixture
from boot_jax.training.denoising import denoising_loss

NAMES = ("cosine", "flow", "linear_beta", "edm", "discrete")
SCHEDULES = {name: get_schedule(name) for name in NAMES}
COSINE = SCHEDULES["cosine"]
SHAPE = (4, 4, 1)


class Pointwise(nn.Module):
    """A network that is compiled in no time; remembers what it was told."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, time, condition=None, added=None, *, deterministic=True):
        h = x * self.param("scale", nn.initializers.constant(0.3), ())
        told = self.param("time", nn.initializers.constant(0.2), ())
        h = h + told * time[:, None, None, None] / 1000
        if condition is not None:
            label = condition["label"].astype(jnp.float32)
            self.sow("intermediates", "label", condition["label"])
            h = h + 0.1 * label[:, None, None, None]
        return nn.Dropout(self.dropout, deterministic=deterministic)(h)


IMAGES = jnp.asarray(
    np.random.default_rng(2).uniform(-1, 1, size=(64, *SHAPE)), jnp.float32
)


def value_and_grad(network, schedule=COSINE, kind="v_prediction", seed=0, **options):
    conditions = Conditions(options.pop("num_classes", None))
    batch = {"image": IMAGES} | options.pop("batch", {})
    loss = denoising_loss(
        network=network,
        schedule=schedule,
        prediction_type=kind,
        conditions=conditions,
        **options,
    )
    params = {"scale": jnp.asarray(0.3), "time": jnp.asarray(0.2)}
    return jax.value_and_grad(loss, has_aux=True)(
        params, None, None, batch, jax.random.key(seed), 0.0
    )


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_denoising_loss_is_finite(name, kind):
    (value, metrics), grads = value_and_grad(Pointwise(), SCHEDULES[name], kind)
    assert 0 < value < 10 and metrics["loss/denoising"] == value
    assert all(np.isfinite(grad) and grad != 0 for grad in grads.values())


@pytest.mark.parametrize("name", ["cosine", "edm"])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_posterior_mean_is_the_best_that_can_be_predicted(name, kind):
    """The loss knows the one denoiser it should lead to: that of the data itself."""
    schedule = SCHEDULES[name]
    teacher = gaussian_mixture(np.zeros((1, *SHAPE), np.float32), [0.5], schedule)
    rng = np.random.default_rng(0)
    data = jnp.asarray(0.5 * rng.normal(size=(2048, *SHAPE)), jnp.float32)

    class Exact(nn.Module):
        bend: float = 1.0

        @nn.compact
        def __call__(self, x, time, condition=None, added=None):
            grid = jnp.linspace(1e-3, 1.0, 20_001)
            t = jnp.interp(time, schedule.time_input(grid), grid)
            x_t = x / schedule.input_scale(t)[:, None, None, None]
            x_0 = self.bend * teacher.denoise(teacher.params, x_t, t, None)
            alpha = schedule.alpha(t)[:, None, None, None]
            sigma = schedule.sigma(t)[:, None, None, None]
            eps = (x_t - alpha * x_0) / sigma
            n = jnp.hypot(alpha, sigma)
            return {
                "epsilon": eps,
                "sample": x_0,
                "v_prediction": (alpha * eps - sigma * x_0) / n,
                "flow_prediction": eps - x_0,
            }[kind]

    def loss(bend):
        of_data = denoising_loss(
            network=Exact(bend),
            schedule=schedule,
            prediction_type=kind,
            conditions=Conditions(),
            t_min=0.1,
        )
        return float(
            of_data({}, None, None, {"image": data}, jax.random.key(1), 0.0)[0]
        )

    best = loss(1.0)
    assert best < loss(0.9) and best < loss(1.1)


@pytest.mark.parametrize("share, expected", [(0.0, 0.0), (1.0, 1.0), (0.25, 0.25)])
def test_a_share_of_the_labels_is_dropped(share, expected):
    labels = jnp.asarray(np.arange(4096) % 3, jnp.int32)
    network, seen = Pointwise(), []

    class Watched(nn.Module):
        @nn.compact
        def __call__(self, x, time, condition=None, added=None):
            seen.append(np.asarray(condition["label"]))
            return network.apply(
                {"params": {"scale": jnp.asarray(0.3), "time": jnp.asarray(0.2)}},
                x,
                time,
                condition,
            )

    loss = denoising_loss(
        network=Watched(),
        schedule=COSINE,
        prediction_type="v_prediction",
        conditions=Conditions(3),
        label_dropout=share,
    )
    batch = {"image": jnp.zeros((4096, 1, 1, 1)), "label": labels}
    loss({}, None, None, batch, jax.random.key(0), 0.0)
    dropped = seen[0] == 3
    assert abs(dropped.mean() - expected) < 0.03
    np.testing.assert_array_equal(seen[0][~dropped], labels[~dropped])


def told_tokens(share, microbatches=1):
    """Captions of a batch of 4096, and the tokens that a network is told."""
    tokens = jnp.asarray(1 + np.arange(4096 * 3).reshape(4096, 3) % 7, jnp.int32)
    loss = denoising_loss(
        network=Pointwise(),
        schedule=COSINE,
        prediction_type="v_prediction",
        conditions=Conditions(),
        label_dropout=share,
    )
    batch = {"image": jnp.zeros((4096, 1, 1, 1)), "tokens": tokens}
    inputs = loss.draw(batch, jax.random.key(0), 0.0, microbatches)
    return np.asarray(tokens), np.asarray(inputs["tokens"])


@pytest.mark.parametrize("share, expected", [(0.0, 0.0), (1.0, 1.0), (0.25, 0.25)])
def test_a_share_of_the_captions_becomes_the_empty_prompt(share, expected):
    tokens, (told,) = told_tokens(share)
    dropped = (told == 0).all(1)
    assert abs(dropped.mean() - expected) < 0.03
    np.testing.assert_array_equal(told[~dropped], tokens[~dropped])
    _, parts = told_tokens(share, microbatches=4)
    np.testing.assert_array_equal(parts.reshape(told.shape), told)


def test_a_network_with_text_is_told_the_tokens():
    seen = []

    class Reader(nn.Module):
        @nn.compact
        def __call__(self, x, time, condition=None, added=None):
            seen.append(condition)
            return x

    tokens = jnp.asarray([[1, 2], [3, 0]], jnp.int32)
    loss = denoising_loss(
        network=Reader(),
        schedule=COSINE,
        prediction_type="v_prediction",
        conditions=Conditions(),
        label_dropout=0.0,
    )
    batch = {"image": jnp.zeros((2, 1, 1, 1)), "tokens": tokens}
    loss({}, None, None, batch, jax.random.key(0), 0.0)
    assert seen[0].keys() == {"tokens"}
    np.testing.assert_array_equal(seen[0]["tokens"], tokens)


def test_a_network_without_classes_is_told_no_label():
    batch = {"label": jnp.zeros(64, jnp.int32)}
    alone = value_and_grad(Pointwise())
    beside = value_and_grad(Pointwise(), batch=batch)
    assert alone[0][0] == beside[0][0]
    told = value_and_grad(Pointwise(), num_classes=3, batch=batch, label_dropout=1.0)
    assert told[0][0] != alone[0][0]


def test_dropout_is_on_and_drawn_from_the_step():
    plain = value_and_grad(Pointwise())[0][0]
    dropped = [value_and_grad(Pointwise(0.5), seed=seed)[0][0] for seed in (0, 0, 1)]
    assert dropped[0] == dropped[1] != dropped[2]
    assert plain != dropped[0]


@pytest.mark.parametrize("num_classes", [None, 3])
def test_a_unet_with_dropout_is_trained(num_classes):
    network = create_network(
        "unet",
        sample_shape=SHAPE,
        num_classes=num_classes,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        dropout=0.5,
    )
    shapes = jax.eval_shape(initialiser(network, SHAPE, num_classes), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes
    )
    loss = denoising_loss(
        network=network,
        schedule=COSINE,
        prediction_type="v_prediction",
        conditions=Conditions(num_classes),
    )
    batch = {"image": IMAGES[:8], "label": jnp.arange(8, dtype=jnp.int32) % 3}
    call = jax.jit(jax.value_and_grad(loss, has_aux=True))
    values = [
        call(params, None, None, batch, jax.random.key(seed), 0.0) for seed in (0, 0, 1)
    ]
    losses = [float(value[0][0]) for value in values]
    assert losses[0] == losses[1] != losses[2] and np.isfinite(losses).all()
    grads = jax.tree.leaves(values[0][1])
    assert all(np.isfinite(grad).all() for grad in grads)
    assert sum(bool(np.any(grad)) for grad in grads) == len(grads)
