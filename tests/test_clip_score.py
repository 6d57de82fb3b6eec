"""CLIP's image encoder and score against transformers, with random weights."""

import json
from typing import Any

import jax
import numpy as np
import pytest
import stable_diffusion
import torch
from clip_folders import write_clip_model
from meshes import mesh_of
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from boot_jax.evaluation.clip_score import ClipScorer, Preprocessor
from boot_jax.evaluation.features import FeatureError
from boot_jax.models.clip_vision import UNUSED, CLIPVisionEncoder
from boot_jax.models.weights import WeightsError, from_diffusers

TINY: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "projection_dim": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 30,
    "patch_size": 10,
}
PROMPTS = ["a red house", "1984", "the moon over the river", "an astronaut", "naïve"]


def random_images(*shape: int) -> np.ndarray:
    coarse = np.random.default_rng(0).uniform(-1, 1, shape)
    return coarse.repeat(5, 1).repeat(5, 2).astype(np.float32)


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu", "patch_size": 15}])
def test_image_encoder_equals_transformers(changes: dict[str, Any]):
    config = CLIPVisionConfig(**(TINY | changes))
    model = stable_diffusion.randomised(CLIPVisionModelWithProjection(config))
    network = CLIPVisionEncoder.from_config(config.to_dict())
    images = np.random.default_rng(1).normal(size=(3, 30, 30, 3)).astype(np.float32)
    template = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    params = from_diffusers(tensors, template, ignore=UNUSED)
    found = jax.jit(network.apply)({"params": params}, images)
    with torch.no_grad():
        given = torch.tensor(images).permute(0, 3, 1, 2)
        wanted = model(given)
        pooled = model.vision_model(given).pooler_output
    for ours, theirs in (
        (found.last_hidden_state, wanted.last_hidden_state),
        (found.pooled, pooled),
        (found.image_embeds, wanted.image_embeds),
    ):
        assert theirs.std() > 0.1
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-4)


def test_full_size_has_the_parameters_of_pytorch():
    """Of ``clip-vit-large-patch14``."""
    config = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    config |= {"num_attention_heads": 16, "patch_size": 14, "projection_dim": 768}
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
    network = CLIPVisionEncoder.from_config(config)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    template = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    shapes = stable_diffusion.torch_shapes(template)
    assert shapes == {k: tuple(v.shape) for k, v in model.state_dict().items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "clip"}, "model_type='clip' is not supported"),
        ({"hidden_act": "relu"}, "hidden_act='relu' .* 'quick_gelu' or 'gelu'"),
        ({"num_attention_heads": 5}, ".* a divisor of hidden_size=24"),
        ({"patch_size": 0}, "patch_size=0 .* a positive integer"),
    ],
)
def test_refuses_what_it_would_compute_otherwise(changes, message):
    with pytest.raises(ValueError, match=f"CLIPVisionEncoder: {message}"):
        CLIPVisionEncoder.from_config(TINY | changes)


# --- the score


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a tiny random model, whose cosines are well away from 0."""
    folder = write_clip_model(tmp_path_factory.mktemp("model") / "clip", TINY)
    CLIPImageProcessor(
        size={"shortest_edge": 36}, crop_size=30, image_mean=[0.4, 0.5, 0.6]
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("shape", "devices"), [((5, 9, 9, 3), 1), ((5, 5, 11, 3), 2), ((5, 12, 6, 1), 8)]
)
def test_score_is_that_of_transformers(folder, shape, devices):
    images = random_images(*shape)
    pixels = np.rint(images.astype(np.float64) * 127.5 + 127.5).astype(np.uint8)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
    processor = CLIPImageProcessor.from_pretrained(folder)
    prepared = processor([Image.fromarray(p) for p in pixels], return_tensors="np")
    ours = Preprocessor.from_folder(folder, 30)(images)
    wanted = prepared["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, wanted, atol=1e-5)

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(
            input_ids=tokens["input_ids"],
            pixel_values=torch.tensor(prepared["pixel_values"]),
        )
    cosines = (out.image_embeds * out.text_embeds).sum(-1).numpy()
    scorer = ClipScorer.from_folder(str(folder), mesh_of(devices))
    found = scorer(images, PROMPTS)
    assert found.shape == (5,) and np.std(cosines) > 1e-3
    np.testing.assert_allclose(found, 100 * cosines.clip(0), rtol=1e-4, atol=1e-3)


def test_without_a_preprocessor_the_means_are_openais(folder, tmp_path):
    ours = Preprocessor.from_folder(tmp_path, 30)(np.zeros((1, 30, 30, 3)))
    standard = CLIPImageProcessor()
    wanted = (128 / 255 - np.asarray(standard.image_mean)) / standard.image_std
    np.testing.assert_allclose(ours[0, 0, 0], wanted, rtol=1e-5)


def test_folders_that_are_no_clip_are_refused(folder, tmp_path):
    with pytest.raises(FeatureError, match=r"holds no config.json; .*openai/clip"):
        ClipScorer.from_folder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FeatureError, match="is a 'bert', but a 'clip' model"):
        ClipScorer.from_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FeatureError, match=r"config.json cannot be read"):
        ClipScorer.from_folder(str(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="holds no weights"):
        ClipScorer.from_folder(str(tmp_path))
    fields = {"crop_size": 20, "size": 20}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(FeatureError, match=r"crops images to 20, but .* reads 30"):
        Preprocessor.from_folder(tmp_path, 30)
