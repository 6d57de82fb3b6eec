"""The paper: a student learns the signal of its teacher's trajectories without data.

**The student** ``y_theta(eps, t)`` takes the noise at which a trajectory of the
teacher's ODE starts and a target time, and gives the signal there,

    y_t = (x_t - sigma_t eps) / alpha_t.                                        (1)

The signal obeys an ODE in which the noise has cancelled (Gu et al., *BOOT*, arXiv
2306.05544; ``f`` is the teacher as a denoiser, ``lambda = log(sigma / alpha)``):

    dy / dlambda = y - f(x, t),     x = alpha y + sigma eps,                    (2)

so that one DDIM step of the teacher from ``t`` to ``s < t`` moves the signal by

    y_s = y_t + k (f(x_t, t) - y_t),     k = 1 - exp(lambda_s - lambda_t).      (3)

**Bootstrap** (`boot_loss`). The student's own signal at ``t``, moved by eq. (3),
teaches its signal at ``s = t - delta``; SG stops the gradient through all of the
target:

    L_BS = E w || y_theta(eps, s) - SG[y + k (f(x_t, t) - y)] ||^2,  y = y_theta(eps, t)
    L_BC = E || y_theta(eps, t_max) - f(eps, t_max) ||^2
    L    = L_BS + beta L_BC.                                                    (4)

Divided by ``k``, the difference in L_BS is the one between the *implied image*
``y_t + (y_theta(eps, s) - y_t) / k`` and ``f``; with that, any distance between images
(squared error, LPIPS) serves. The weights ``w`` are then ``1`` for ``x0`` weighting,
``(k / delta)^2`` for ``dt``, ``k^2`` for ``uniform``, each in terms of that image. And
``(alpha_s k)^2`` for ``noisy_image``: that is the squared error of ``x_s`` itself,
since ``x_s = alpha_s y_s + sigma_s eps`` with the same ``eps`` on either side of L_BS,
the loss of a student that predicts noisy images.

**Continuous time** (`continuous_loss`). As ``delta`` goes to 0, eq. (2) itself:

    L = E || y_theta(eps, t) - SG[f(x_t, t) + (dt / dlambda) dy_theta / dt] ||^2  (5)

(the prediction half of FreeFlow, arXiv 2511.19428). Where ``alpha = 0`` the factor is 0
and eq. (5) is the boundary condition; elsewhere the boundary loss is added all the
same.

**Rivals** on the same floor, each derived in its own module: `pid_loss`, `direct_loss`,
`progressive_loss`, `consistency_loss`.

**Adaptive weights.** Early on, ``dy_theta / dt`` can run away before the student has
learned to follow it, and the damage to the weights it started from stays. Dividing each
image's distance ``d`` by its own size bounds every image's pull:

    d <- d / SG[d + c]^p                                                        (6)

(the adaptive weights of MeanFlow, arXiv 2505.13447).

**Correction** (`correction_loss`). Beside trajectories, the distribution of the
student's samples: see `boot_jax.objectives.correction`.

The losses are pure: no state, no globals, nothing but arrays and the two functions

    denoise(params, x_t, t, condition) -> x_0        the teacher
    signal(params, eps, t, condition) -> y_t         the student

(and for the rivals that need them real images, and the student as a denoiser), so they
can be jitted, differentiated, vmapped and sharded by anybody's training loop.
"""

from collections.abc import Callable

from jax import Array

from boot_jax.objectives.base import (
    IMAGE_KINDS,
    KINDS,
    TARGET_TIME_KINDS,
    Distance,
    Objective,
    Signal,
    draw_times,
    squared_error,
)
from boot_jax.objectives.boot import boot_loss
from boot_jax.objectives.consistency import consistency_function, consistency_loss
from boot_jax.objectives.continuous import continuous_loss
from boot_jax.objectives.correction import (
    auxiliary_loss,
    correction_loss,
    draw_renoising_times,
)
from boot_jax.objectives.direct import direct_loss
from boot_jax.objectives.options import Correction
from boot_jax.objectives.pid import pid_loss
from boot_jax.objectives.progressive import progressive_loss
from boot_jax.objectives.starts import (
    RENOISE,
    Jump,
    StartedSchedule,
    choose_starts,
    draw_starts,
    started_loss,
)

#: The losses by ``objective.kind``: ``(params, teacher_params, eps, t, condition, *,
#: signal, denoise, schedule, objective, target_params) -> (loss, metrics)``, as
#: `boot_loss` describes them. Kinds that learn from real images also need ``images``
#: and ``student_denoise``; ``direct`` may be given ``targets``.
LOSSES: dict[str, Callable[..., tuple[Array, dict[str, Array]]]] = {
    "boot": boot_loss,
    "continuous": continuous_loss,
    "pid": pid_loss,
    "direct": direct_loss,
    "progressive": progressive_loss,
    "consistency": consistency_loss,
}

__all__ = [
    "IMAGE_KINDS",
    "KINDS",
    "LOSSES",
    "RENOISE",
    "TARGET_TIME_KINDS",
    "Correction",
    "Distance",
    "Jump",
    "Objective",
    "Signal",
    "StartedSchedule",
    "auxiliary_loss",
    "boot_loss",
    "choose_starts",
    "consistency_function",
    "consistency_loss",
    "continuous_loss",
    "correction_loss",
    "direct_loss",
    "draw_renoising_times",
    "draw_starts",
    "draw_times",
    "pid_loss",
    "progressive_loss",
    "squared_error",
    "started_loss",
]
