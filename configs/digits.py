"""Handwritten digits: the demo. A teacher is trained, then distilled without data.

python -m boot_jax.main --config=configs/digits.py
"""

from boot_jax.config import default_config

_UNCORRECTED = "objective.correction.strength=0.0"

# What each method needs to be at its best here, beside the settings of all.
METHODS = {
    "corrected": ("objective.kind=continuous",),
    "continuous": (_UNCORRECTED,),
    "boot": (
        _UNCORRECTED,
        "objective.kind=boot",
        "objective.weighting=uniform",
        "objective.boundary_weight=1.0",
        "objective.boundary_share=0.25",
        "objective.adaptive_power=0.0",
    ),
    "pid": (_UNCORRECTED, "objective.kind=pid"),
    "direct": (_UNCORRECTED, "objective.kind=direct", "objective.solver=ddim"),
    "progressive": (
        _UNCORRECTED,
        "objective.kind=progressive",
        "objective.teacher_steps=32",
        "objective.adaptive_power=0.0",
    ),
    "consistency": (
        _UNCORRECTED,
        "objective.kind=consistency",
        "objective.target_network=ema",
        "objective.grid_power=2.0",
    ),
}


def get_config():
    config = default_config()
    config.title = "Digits: a diffusion transformer in one step"
    config.data.name = "digits"
    config.network.name = "dit"
    config.network.dit = {
        "patch_size": 4,
        "hidden_size": 128,
        "num_layers": 4,
        "num_heads": 4,
        "mlp_ratio": 4.0,
    }
    config.teacher.training.num_steps = 3000
    config.teacher.training.learning_rate = 2e-3
    config.objective.kind = "continuous"
    config.objective.boundary_weight = 0.0  # contained in eq. 5, since alpha(1) = 0
    config.objective.adaptive_power = 1.0
    config.objective.correction.strength = 0.1
    config.distill.learning_rate = 2e-3
    config.distill.num_steps = 5000
    config.run.checkpoint_every = 500
    config.compare.kinds = tuple(METHODS)
    config.compare.variants = METHODS
    return config
