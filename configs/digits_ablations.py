"""The choices that the paper leaves open, each turned by itself, on the digits.

python -m boot_jax.main --config=configs/digits_ablations.py --mode=compare

One teacher, three seeds, the same number of network calls for all. Some of it, by more
than one process in the same workdir:

    --config.compare.kinds=boot,boot_no_boundary --config.compare.seeds=0,
"""

import pathlib
import runpy

DIGITS = runpy.run_path(str(pathlib.Path(__file__).with_name("digits.py")))
_BOOT = DIGITS["METHODS"]["boot"]
# A noisy image has no signal in it where alpha is 0, so t_max is lower, for both.
_LOWER_T_MAX = (*_BOOT, "objective.t_max=0.98")

VARIANTS = {
    "continuous": ("objective.kind=continuous",),  # as configs/digits.py
    "continuous_finite_difference": ("objective.derivative=finite_difference",),
    "continuous_not_adaptive": ("objective.adaptive_power=0.0",),
    "continuous_ema_target": ("objective.target_network=ema",),
    "continuous_reused_time": ("student.time_conditioning=reused",),
    "boot": _BOOT,
    "boot_progressive_time": (*_BOOT, "objective.time_order=progressive"),
    "boot_no_boundary": (*_BOOT, "objective.boundary_weight=0.0"),
    "boot_short_step": (*_BOOT, "objective.delta=0.01"),
    "boot_long_step": (*_BOOT, "objective.delta=0.16"),
    "boot_x0_weights": (*_BOOT, "objective.weighting=x0"),
    "boot_dt_weights": (*_BOOT, "objective.weighting=dt"),
    "boot_ddim": (*_BOOT, "objective.solver=ddim"),
    "boot_adaptive": (*_BOOT, "objective.adaptive_power=1.0"),
    "boot_ema_target": (*_BOOT, "objective.target_network=ema"),
    "boot_reused_time": (*_BOOT, "student.time_conditioning=reused"),
    "boot_signal": _LOWER_T_MAX,
    "boot_noisy_image": (
        *_LOWER_T_MAX,
        "student.output=noisy_image",
        "objective.weighting=noisy_image",
    ),
}


def get_config():
    config = DIGITS["get_config"]()
    config.title = "Digits: the choices that the paper leaves open"
    config.objective.correction.strength = 0.0
    config.compare.kinds = ()
    config.compare.variants = VARIANTS
    return config
