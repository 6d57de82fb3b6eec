"""Stable Diffusion 2.1 in one step, from prompts alone: 865.9 M parameters.

python -m boot_jax.main --config=configs/sd21.py       # 768x768, v-prediction
python -m boot_jax.main --config=configs/sd21.py:base  # 512x512, epsilon

Not run here, for lack of the weights; see sd15.py, whose settings these are.
"""

import pathlib
import runpy

_SD15 = pathlib.Path(__file__).with_name("sd15.py")
_TEACHERS = {
    "v": ("stabilityai/stable-diffusion-2-1", "768"),
    "base": ("stabilityai/stable-diffusion-2-1-base", "512"),
}


def get_config(variant="v"):
    if variant not in _TEACHERS:
        raise ValueError(f"configs/sd21.py has no {variant!r}, only v and base")
    config = runpy.run_path(str(_SD15))["get_config"]()
    config.teacher.path, size = _TEACHERS[variant]
    config.title = f"Stable Diffusion 2.1 at {size} in one step"
    return config
