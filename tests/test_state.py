"""The moving average and the optimizer, against formulas worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from boot_jax.training.state import create_optimizer, create_state, update_ema


def test_the_state_begins_with_copies():
    params = {"kernel": jnp.arange(6.0).reshape(2, 3)}
    state = create_state(params, optax.adam(1e-3))
    assert state.step == 0 and state.step.dtype == jnp.int32
    np.testing.assert_array_equal(state.ema_params["kernel"], params["kernel"])
    donated = jax.jit(lambda tree: tree, donate_argnums=0)(state.params)
    assert params["kernel"].is_deleted() and donated["kernel"].shape == (2, 3)
    assert not state.ema_params["kernel"].is_deleted()


def test_the_average_follows_its_formula():
    """Decay ``min(decay, (1 + n) / (10 + n))``: 0.1 at first, then longer."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(120, 4))
    average, expected = jnp.zeros(4), np.zeros(4)
    for step, value in enumerate(values):
        average = update_ema(
            {"a": average},
            {"a": jnp.asarray(value, jnp.float32)},
            jnp.asarray(step, jnp.int32),
            0.9,
        )["a"]
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-5)
    assert average.dtype == jnp.float32


def test_an_average_of_nothing_is_the_parameters():
    new = update_ema({"a": jnp.zeros(2)}, {"a": jnp.ones(2)}, jnp.asarray(5), 0.0)
    np.testing.assert_array_equal(new["a"], np.ones(2))


def learning_rates(steps, **options):
    """What each step moves by: Adam's first moves are the learning rate itself."""
    optimizer = create_optimizer(b1=0.0, b2=0.0, **options)
    params = {"a": jnp.zeros(())}
    state, moves = optimizer.init(params), []
    for _ in range(steps):
        updates, state = optimizer.update({"a": jnp.ones(())}, state, params)
        moves.append(-float(updates["a"]))
    return moves


@pytest.fixture(autouse=True)
def optax_promotes():
    # As the training step has it: optax raises a float to an integer count.
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_the_rate_warms_up_and_stays():
    rates = learning_rates(
        8, learning_rate=0.5, num_steps=8, warmup_steps=4, decay="constant"
    )
    expected = [0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_the_rate_warms_up_and_decays_to_zero():
    rates = learning_rates(
        11, learning_rate=0.5, num_steps=10, warmup_steps=2, decay="cosine"
    )
    progress = np.arange(9) / 8
    decayed = 0.5 * (1 + np.cos(np.pi * progress)) / 2
    np.testing.assert_allclose(rates, [0, 0.25, *decayed], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_without_warm_up_the_first_step_is_a_full_one(decay):
    rates = learning_rates(1, learning_rate=0.5, num_steps=4, decay=decay)
    np.testing.assert_allclose(rates, [0.5], rtol=1e-5)


def test_a_warm_up_longer_than_the_run_is_no_error():
    rates = learning_rates(
        3, learning_rate=0.5, num_steps=2, warmup_steps=10, decay="cosine"
    )
    np.testing.assert_allclose(rates, [0, 0.05, 0.1], rtol=1e-5)


def test_an_update_is_that_of_pytorch():
    """AdamW after clipping by the global norm, in torch."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(3, 4)).astype(np.float32)
    grads = rng.normal(size=(6, 3, 4)).astype(np.float32) * 3
    optimizer = create_optimizer(
        learning_rate=0.03,
        num_steps=6,
        b1=0.8,
        b2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.5,
    )
    params = {"a": jnp.asarray(start)}
    state = optimizer.init(params)
    witness = torch.nn.Parameter(torch.tensor(start))
    adam = torch.optim.AdamW(
        [witness], lr=0.03, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1
    )
    for grad in grads:
        updates, state = optimizer.update({"a": jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
        witness.grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_([witness], 1.5)
        adam.step()
    np.testing.assert_allclose(params["a"], witness.detach(), rtol=1e-4, atol=1e-5)


def test_an_unknown_decay_is_refused():
    with pytest.raises(ValueError, match=r"'linear'.*'constant', 'cosine'"):
        create_optimizer(learning_rate=1.0, num_steps=1, decay="linear")
