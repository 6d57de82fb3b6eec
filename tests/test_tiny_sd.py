"""The tiny Stable Diffusion of examples/ and configs/: from its script to PyTorch."""

import importlib
import pathlib

import numpy as np
import pytest
from command import command
from PIL import Image

from boot_jax.training.logs import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
FEW = (
    "--config.distill.num_steps=4",
    "--config.distill.batch_size=8",
    "--config.run.checkpoint_every=2",
    "--config.run.sample_every=0",
    "--config.run.tensorboard=False",
)
CORRECTED = (
    "--config.objective.correction.strength=0.1",
    "--config.objective.correction.share=0.5",
    "--config.objective.correction.lora_rank=4",
)


@pytest.mark.slow
def test_the_whole_way(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    from diffusers import StableDiffusionPipeline

    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "examples")
    importlib.import_module("write_tiny_sd").main(tmp_path / "teacher")
    run = (
        "--config=configs/tiny_sd.py",
        f"--config.teacher.path={tmp_path / 'teacher'}",
        f"--workdir={tmp_path / 'run'}",
        *FEW,
    )
    for embeddings, more in (("none", ()), ("float32", CORRECTED)):
        workdir = f"--workdir={tmp_path / embeddings}"
        option = f"--config.prompts.embeddings={embeddings}"
        assert command(*run, workdir, option, *more, "--mode=distill") == 0
    plain, corrected = (read_metrics(tmp_path / name) for name in ("none", "float32"))
    assert [row["step"] for row in plain] == [row["step"] for row in corrected] == [4]
    assert all(np.isfinite(row["loss"]) for row in (*plain, *corrected))
    assert all(row["loss/correction"] > 0 for row in corrected)
    run = (*run, f"--workdir={tmp_path / 'none'}")
    options = ("--prompt=a red house", "--config.sample.prompt_to=a cat", "--num=3")
    assert command(*run, "--mode=sample", *options) == 0
    (folder,) = (tmp_path / "none" / "samples").glob("seed_0_guidance_2_prompts_*")
    with Image.open(folder / "animation.gif") as animation:
        assert animation.n_frames == 3
    frames = [np.asarray(Image.open(p), int) for p in sorted(folder.glob("0*.png"))]
    ends = np.abs(frames[0] - frames[2]).mean()
    assert 0 < np.abs(frames[0] - frames[1]).mean() < ends
    assert command(*run, "--mode=export") == 0
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "none" / "export")
    (image,) = pipeline(
        "a red house",
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(0),
    ).images
    assert image.size == (16, 16)
