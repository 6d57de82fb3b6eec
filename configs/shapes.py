"""Coloured shapes from captions: text-to-image in one step, on two cores.

python -m boot_jax.main --config=configs/shapes.py

A teacher learns 16x16 shapes with captions ("a small red square at left on white"),
which are drawn as they are needed. A student is distilled from the captions alone, of
configs/prompts/shapes.txt, which was written with

python -c "from boot_jax import shapes; print(*shapes.captions(), sep='\\n')"
"""

from boot_jax.config import default_config


def get_config():
    config = default_config()
    config.title = "Coloured shapes from captions, in one step"
    config.data.name = "shapes"
    config.data.captions = True
    config.prompts.path = "configs/prompts/shapes.txt"
    config.network.name = "dit"
    return config
