"""examples/distil_a_hub_model.md: its commands run, and its figures are true."""

import os
import pathlib
import re
import shlex

import jax
import numpy as np
import pipelines
import pytest
import torch
from command import command
from diffusers import DDIMPipeline, DiTPipeline, DiTTransformer2DModel, UNet2DModel

from boot_jax.models.transformer import Transformer
from boot_jax.models.unet import UNet
from boot_jax.teachers.checkpoint import initialiser

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "examples" / "distil_a_hub_model.md").read_text()
COMMANDS = re.findall(r"^    python -m boot_jax.main (.*)$", TEXT, re.MULTILINE)
PROGRAMS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)

# The published configs; what is left out is the class's default.
DDPM_CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", *("DownBlock2D",) * 2),
    "up_block_types": (*("UpBlock2D",) * 2, "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
DIT_XL_2 = {"sample_size": 32, "out_channels": 8}

# What makes any run small.
TINY = (
    "--config.distill.num_steps=4",
    "--config.teacher.param_dtype=float32",
    "--config.distill.batch_size=8",
    "--config.distill.microbatches=1",
    "--config.distill.warmup_steps=1",
    "--config.mesh.fsdp=1",
    "--config.evaluation.num_images=8",
    "--config.evaluation.batch_size=8",
    "--config.evaluation.ddim_steps=(1,)",
    "--config.evaluation.ode_steps=2",
    "--config.evaluation.error_times=1",
    "--config.evaluation.error_images=8",
    "--config.evaluation.grid_images=2",
    "--config.run.checkpoint_every=2",
    "--config.run.sample_every=4",
    "--config.run.sample_images=2",
    "--config.run.tensorboard=False",
)


@pytest.mark.parametrize(
    "network, model, config, classes",
    [
        (UNet, UNet2DModel, DDPM_CIFAR10, None),
        (Transformer, DiTTransformer2DModel, DIT_XL_2, 1000),
    ],
)
def test_parameter_counts(network, model, config, classes):
    with torch.device("meta"):
        expected = sum(leaf.numel() for leaf in model(**config).parameters())
    ours = network.from_config(config)
    shape = (32, 32, ours.in_channels)
    params = jax.eval_shape(initialiser(ours, shape, classes), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected
    assert f"{expected:,}" in TEXT


def run(line: str, folder: pathlib.Path, hub_id: str, tmp_path: pathlib.Path) -> int:
    arguments = shlex.split(line.replace("runs/", f"{tmp_path}/"))
    if "inspect" in line:
        arguments = [argument.replace(hub_id, str(folder)) for argument in arguments]
        return command(*arguments[:-1], "--batch_size=2")
    path = f"--config.teacher.path={folder}"
    return command(*arguments, path, *TINY, "--config.network.dtype=float32")


@pytest.mark.slow
def test_the_commands_run(tmp_path, capsys, monkeypatch):
    """And PyTorch runs what comes out."""
    monkeypatch.chdir(ROOT)
    unet = pipelines.unet(**pipelines.ONE_LEVEL)
    dit = pipelines.dit(num_layers=1, num_embeds_ada_norm=1000)
    folders = {
        "ddpm": ("google/ddpm-cifar10-32", pipelines.ddpm_pipeline(unet)),
        "dit": ("facebook/DiT-XL-2-256", pipelines.dit_pipeline(dit, pipelines.vae())),
    }
    assert len(COMMANDS) == 7
    assert all(hub_id in TEXT for hub_id, _ in folders.values())
    for name, (hub_id, pipeline) in folders.items():
        pipeline.save_pretrained(tmp_path / "teachers" / name)
        for line in COMMANDS:
            if f"configs/{name}" in line or hub_id in line:
                folder = tmp_path / "teachers" / name
                assert run(line, folder, hub_id, tmp_path) == 0, line
    assert "set in the config" in capsys.readouterr().out
    for name in ("ddpm", "dit"):
        samples = tmp_path / name / "samples"
        assert (samples / "step_00000004.png").exists()
    assert len(list((tmp_path / "dit" / "samples").glob("*label_207*/0*.png"))) == 16
    assert len(PROGRAMS) == 2
    for program, pipeline in zip(PROGRAMS, (DDIMPipeline, DiTPipeline), strict=True):
        assert pipeline.__name__ in program
        found = {"tmp": os.fspath(tmp_path)}
        exec(program.replace('"runs/', 'tmp + "/'), found)
        image = np.asarray(found["image"])
        assert image.ndim == 3 and image.std() > 0
