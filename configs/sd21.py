"""Stable Diffusion 2.1 in one step, from prompts alone: 865.9 M parameters.

python -m boot_jax.main --config=configs/sd21.py       # 768x768, v-prediction
python -m boot_jax.main --config=configs/sd21.py:base  # 512x512, epsilon

Not run here, for lack of the weights; see sd15.py, whose settings these are.
"""

import importlib.util
import pathlib

_TEACHERS = {
    "v": ("stabilityai/stable-diffusion-2-1", "768"),
    "base": ("stabilityai/stable-diffusion-2-1-base", "512"),
}


def get_config(variant="v"):
    if variant not in _TEACHERS:
        raise ValueError(f"configs/sd21.py has no {variant!r}, only v and base")
    config = sibling("sd15")
    config.teacher.path, size = _TEACHERS[variant]
    config.title = f"Stable Diffusion 2.1 at {size} in one step"
    return config


def sibling(name):
    path = pathlib.Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
