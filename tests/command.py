"""The command, called as from a terminal, but in this process; and tiny runs for it."""

import importlib
import pathlib
import sys
from typing import Any
from unittest import mock

from absl import flags

_OURS = (
    *("config", "workdir", "mode", "num", "seed", "path", "batch_size", "distributed"),
    *("coordinator_address", "num_processes", "process_id"),
    *("prompt", "negative_prompt", "guidance_scale"),
)

DIGITS = """
from boot_jax.config import default_config


def get_config():
    config = default_config()
    config.title = "Tiny digits"
    config.network.dit = {
        "patch_size": 4,
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "mlp_ratio": 2.0,
    }
    for training in (config.teacher.training, config.distill):
        training.num_steps = 40
        training.batch_size = 16
        training.warmup_steps = 5
    config.objective.kind = "continuous"
    config.objective.boundary_weight = 0.0
    config.evaluation.update(
        num_images=64, num_real=200, batch_size=64, ddim_steps=(1, 2, 4),
        ode_steps=6, error_times=3, error_images=16, grid_images=4,
    )
    config.run.update(log_every=10, checkpoint_every=20, steps_per_dispatch=10)
    return config
"""

MIXTURE = DIGITS.replace(
    "    return config\n",
    """
    config.title = "Tiny mixture"
    config.data.name = ""
    config.teacher.source = "mixture"
    config.teacher.mixture.means = ((1.0, 0.0), (-1.0, 0.5))
    config.teacher.mixture.scales = (0.3, 0.2)
    config.network.dit["patch_size"] = 1
    config.network.dit["hidden_size"] = 16
    return config
""",
)


def write_config(folder: pathlib.Path, text: str, name: str = "tiny.py") -> str:
    """Writes a config file; gives the flag that names it."""
    path = folder / name
    path.write_text(text)
    return f"--config={path}"


def command(*arguments: Any) -> int:
    """Runs ``python -m boot_jax.main`` with these arguments; gives its exit code."""
    for name in list(flags.FLAGS):
        if name.split(".")[0] in _OURS:
            delattr(flags.FLAGS, name)
    sys.modules.pop("boot_jax.main", None)
    main = importlib.import_module("boot_jax.main").main
    with mock.patch.object(sys, "argv", ["boot_jax", *map(str, arguments)]):
        return main()
