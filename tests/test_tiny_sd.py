"""The tiny Stable Diffusion of examples/ and configs/: from its script to PyTorch."""

import importlib
import pathlib

import numpy as np
import pytest
from command import command
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
FEW = (
    "--config.distill.num_steps=4",
    "--config.distill.batch_size=8",
    "--config.run.checkpoint_every=2",
    "--config.run.sample_every=0",
    "--config.run.tensorboard=False",
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
    for embeddings in ("none", "float32"):
        workdir = f"--workdir={tmp_path / embeddings}"
        option = f"--config.prompts.embeddings={embeddings}"
        assert command(*run, workdir, option, "--mode=distill") == 0
    losses = [
        (tmp_path / name / "metrics.jsonl").read_text().count("loss")
        for name in ("none", "float32")
    ]
    assert losses[0] == losses[1] > 0
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
