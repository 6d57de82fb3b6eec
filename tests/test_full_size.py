"""Stable Diffusion at its own size: the step is lowered, and nothing is allocated."""

import importlib
import pathlib

import jax
import pytest
import stable_diffusion
import torch
from diffusers import UNet2DConditionModel

ROOT = pathlib.Path(__file__).parents[1]
PUBLISHED = {
    "sd15": stable_diffusion.SD_1_5,
    "sd21": stable_diffusion.SD_2_1,
    "sdxl": stable_diffusion.SDXL,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["sd15", *(pytest.param(n, marks=pytest.mark.long) for n in ("sd21", "sdxl"))],
)
def test_the_step_is_lowered_at_full_size(monkeypatch, name):
    """That of the benchmark, whose teacher has the published parameters."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("stable_diffusion_step")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        step, arguments = benchmark.training(name, batch_size=1)
        text = step.lower(*arguments).as_text()
    _, frozen, *_ = arguments
    assert all(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(arguments)
    )
    with torch.device("meta"):
        model = UNet2DConditionModel(**PUBLISHED[name])
    expected = sum(parameter.numel() for parameter in model.parameters())
    found = sum(leaf.size for leaf in jax.tree.leaves(frozen["teacher"]))
    assert found == expected
    assert "stablehlo.convolution" in text


@pytest.mark.slow
def test_adapters_save_a_second_stable_diffusion(monkeypatch):
    """What a correction adds to the state that the benchmark's step holds."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("stable_diffusion_step")

    def held(correction: str) -> int:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            _, arguments = benchmark.training("sd15", 1, correction=correction)
        state, *_ = arguments
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    without = held("off")
    full, adapters = held("full") - without, held("lora") - without
    # The network and the one moment of its optimizer, in float32.
    assert full == pytest.approx(2 * 4 * 859_520_964, rel=1e-6)
    assert 0 < adapters < 0.15 * full
