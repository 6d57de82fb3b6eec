"""The choices that the paper leaves open, each turned by itself, on the digits.

python -m boot_jax.main --config=configs/digits_ablations.py --mode=compare

One teacher, three seeds, the same number of network calls for all. Some of it, by more
than one process in the same workdir:

    --config.compare.kinds=boot,boot-no-boundary --config.compare.seeds=0,
"""

import importlib.util
import pathlib

_BOOT = (
    "objective.kind=boot",
    "objective.solver=heun",
    "objective.weighting=uniform",
    "objective.boundary_weight=1.0",
    "objective.boundary_share=0.25",
    "objective.adaptive_power=0.0",
)
# A noisy image has no signal in it where alpha is 0, so t_max is lower, for both.
_LOWER_T_MAX = (*_BOOT, "objective.t_max=0.98")

VARIANTS = {
    "continuous": ("objective.kind=continuous",),  # as configs/digits.py
    "continuous-finite-difference": ("objective.derivative=finite_difference",),
    "continuous-not-adaptive": ("objective.adaptive_power=0.0",),
    "continuous-ema-target": ("objective.target_network=ema",),
    "continuous-reused-time": ("student.time_conditioning=reused",),
    "boot": _BOOT,
    "boot-progressive-time": (*_BOOT, "objective.time_order=progressive"),
    "boot-no-boundary": (*_BOOT, "objective.boundary_weight=0.0"),
    "boot-short-step": (*_BOOT, "objective.delta=0.01"),
    "boot-long-step": (*_BOOT, "objective.delta=0.16"),
    "boot-x0-weights": (*_BOOT, "objective.weighting=x0"),
    "boot-dt-weights": (*_BOOT, "objective.weighting=dt"),
    "boot-ddim": (*_BOOT, "objective.solver=ddim"),
    "boot-adaptive": (*_BOOT, "objective.adaptive_power=1.0"),
    "boot-ema-target": (*_BOOT, "objective.target_network=ema"),
    "boot-reused-time": (*_BOOT, "student.time_conditioning=reused"),
    "boot-signal": _LOWER_T_MAX,
    "boot-noisy-image": (
        *_LOWER_T_MAX,
        "student.output=noisy_image",
        "objective.weighting=noisy_image",
    ),
}


def get_config():
    config = sibling("digits")
    config.title = "Digits: the choices that the paper leaves open"
    config.compare.kinds = ()
    config.compare.variants = VARIANTS
    return config


def sibling(name):
    path = pathlib.Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
