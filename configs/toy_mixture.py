"""Eight Gaussians on a ring: the exact teacher, which is never trained.

python -m boot_jax.main --config=configs/toy_mixture.py
"""

import math

from boot_jax.config import default_config


def get_config():
    config = default_config()
    config.title = "A ring of eight Gaussians in one step"
    config.data.name = ""
    config.network.name = "dit"
    config.network.dit = {
        "patch_size": 1,
        "hidden_size": 64,
        "num_layers": 3,
        "num_heads": 1,
        "mlp_ratio": 4.0,
    }
    config.teacher.source = "mixture"
    angles = [math.pi / 4 * index for index in range(8)]
    config.teacher.mixture.sample_shape = (1, 1, 2)
    config.teacher.mixture.means = tuple(
        (1.3 * math.cos(angle), 1.3 * math.sin(angle)) for angle in angles
    )
    config.teacher.mixture.scales = (0.15,) * 8
    config.objective.kind = "continuous"
    config.objective.boundary_weight = 0.0  # contained in eq. 5, since alpha(1) = 0
    config.objective.adaptive_power = 1.0
    config.distill.num_steps = 4000
    config.distill.batch_size = 256
    config.distill.learning_rate = 2e-3
    config.evaluation.num_real = 2048
    config.run.tensorboard = False
    return config
