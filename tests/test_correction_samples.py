"""Two-sample tests of a corrected student, against exact samples of its teacher."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from boot_jax.auxiliary import create_auxiliary
from boot_jax.conditions import Conditions
from boot_jax.objectives import Correction, Objective
from boot_jax.schedules import get_schedule
from boot_jax.student import create_student
from boot_jax.teachers.mixture import gaussian_mixture, sample_mixture
from boot_jax.training.correction import corrected_loss
from boot_jax.training.distillation import distillation_loss
from boot_jax.training.state import create_optimizer, create_state
from boot_jax.training.step import make_train_step

COSINE = get_schedule("cosine")
WEIGHTS = np.array([0.3, 0.25, 0.2, 0.15, 0.1])
ANGLES = 2 * np.pi * np.arange(5) / 5
MEANS = 1.2 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
TEACHER = gaussian_mixture(
    jnp.asarray(MEANS.reshape(5, 1, 1, 2), jnp.float32),
    [0.35] * 5,
    COSINE,
    weights=WEIGHTS,
)
STEPS, BATCH = 3000, 256


class Perceptron(nn.Module):
    """Of a point in the plane and of times; it starts at zero."""

    added_embeddings: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: Any, time: Any, condition: Any = None, added: Any = None):
        del condition
        times = [time / 1000, *(added or {}).values()]
        waves = [f(np.pi * t) for t in times for f in (jnp.sin, jnp.cos)]
        h = jnp.concatenate([x.reshape(-1, 2), jnp.stack([*times, *waves], 1)], axis=1)
        for _ in range(3):
            h = nn.silu(nn.Dense(64)(h))
        init = nn.initializers.zeros_init()
        return nn.Dense(2, kernel_init=init)(h).reshape(x.shape)


def samples_of(num: int, seed: int = 0, steps: int = STEPS, **correction: Any) -> Any:
    """One-step samples ``[num, 2]`` of a student that follows coarse DDIM steps.

    Those are off by a part that no length of training mends.
    """
    objective = Objective(
        kind="boot",
        solver="ddim",
        delta=0.15,
        correction=Correction(**correction),
    )
    student = create_student(TEACHER, network=Perceptron())
    shared: dict[str, Any] = {
        "signal": student.signal,
        "denoise": TEACHER.denoise,
        "schedule": COSINE,
        "objective": objective,
    }
    loss = distillation_loss(
        conditions=Conditions(), sample_shape=(1, 1, 2), batch_size=BATCH, **shared
    )
    if objective.correction.strength:
        auxiliary = create_auxiliary(TEACHER, network=Perceptron())
        loss = corrected_loss(loss, network=auxiliary, **shared)
    keys = jax.random.split(jax.random.key(seed), 4)
    optimizer = create_optimizer(learning_rate=2e-3, num_steps=steps, decay="cosine")
    second = None if loss.auxiliary is None else loss.auxiliary.create(keys[0])
    state = create_state(student.init(keys[1]), optimizer, second)
    step = make_train_step(
        loss, optimizer, ema_decay=0.995, num_steps=steps, steps_per_dispatch=50
    )
    for _ in range(steps // 50):
        state, _ = step(state, TEACHER.params, None, keys[2])
    eps = jax.random.normal(keys[3], (num, 1, 1, 2))
    t = jnp.full((num,), objective.t_min)
    made = jax.jit(student.signal)(state.ema_params, eps, t, None)
    return np.asarray(made, np.float64).reshape(num, 2)


def energies(a: np.ndarray, b: np.ndarray, permutations: int) -> np.ndarray:
    """Energy distances: of two sets of as many points, then of halves of both."""
    both = np.concatenate([a, b])
    distances = cdist(both, both)
    sign = np.concatenate([np.ones(len(a)), -np.ones(len(b))])
    rng = np.random.default_rng(0)
    signs = np.stack([sign, *(rng.permutation(sign) for _ in range(permutations))])
    return -np.einsum("si,si->s", signs @ distances, signs) / len(a) ** 2


def p_value(a: np.ndarray, b: np.ndarray, size: int = 1500) -> float:
    """Of equal distributions: the share of halves that lie as far apart.

    The median over tests of ``size`` points, each of other ones.
    """
    found = [
        energies(a[start : start + size], b[start : start + size], permutations=300)
        for start in range(0, len(a) - size + 1, size)
    ]
    return float(np.median([np.mean(test >= test[0]) for test in found]))


def excess(a: np.ndarray, b: np.ndarray) -> float:
    """How much farther apart than halves are on average."""
    found = energies(a, b, permutations=20)
    return float(found[0] - found[1:].mean())


def exact_samples(num: int, seed: int = 9) -> np.ndarray:
    made = sample_mixture(TEACHER, jax.random.key(seed), num)
    return np.asarray(made, np.float64).reshape(num, 2)


def masses(samples: np.ndarray) -> np.ndarray:
    """The share of samples that lie nearest to each component's mean."""
    nearest = np.argmin(cdist(samples, MEANS), axis=1)
    return np.bincount(nearest, minlength=len(MEANS)) / len(samples)


def test_the_two_sample_test_tells_what_it_should():
    one, other = exact_samples(7500, 1), exact_samples(7500, 2)
    assert p_value(one, other) > 0.2
    assert p_value(one, 0.85 * other) < 0.01


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_a_corrected_student_has_its_teachers_distribution(seed):
    """After as many steps, by a test that the student without correction fails."""
    num = 20_000
    plain = samples_of(num, seed, strength=0.0)
    chosen = {"updates": 5, "auxiliary_share": 1.0, "decay": "constant"}
    corrected = samples_of(num, seed, strength=0.3, **chosen)
    exact = exact_samples(num)
    found = {}
    for name, samples in (("plain", plain), ("corrected", corrected)):
        found[name] = {
            "p": p_value(exact[:13500], samples[:13500]),
            "energy": excess(exact[:4000], samples[:4000]),
            "mass": float(np.abs(masses(samples) - masses(exact)).max()),
            "variance": float(samples.var(axis=0).mean() / exact.var(axis=0).mean()),
        }
    print(found)
    assert found["plain"]["p"] < 0.01 and found["corrected"]["p"] > 0.1
    assert found["corrected"]["energy"] < found["plain"]["energy"] / 3
    assert found["corrected"]["mass"] < 0.03
    assert found["plain"]["variance"] < 0.85
    assert 0.93 < found["corrected"]["variance"] < 1.07
