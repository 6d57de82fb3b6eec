"""CLIP's text encoder against transformers' PyTorch and Flax classes."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stable_diffusion
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from boot_jax.models.clip import UNUSED, CLIPTextEncoder, TextEncoding
from boot_jax.models.weights import (
    from_diffusers,
    read_weights,
    to_diffusers,
)

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 40,
    "projection_dim": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "bos_token_id": 97,
    "eos_token_id": 98,
    "pad_token_id": 98,
}
# Texts that end early, at once and at the last place; the second row is padded by "!".
TOKENS = np.array(
    [
        [97, 5, 7, 1, 98, *[98] * 7],
        [97, 98, *[0] * 10],
        [97, *range(50, 60), 98],
    ],
    np.int32,
)
CONFIGS: dict[str, dict[str, Any]] = {
    "sd 1": {},
    "sd 2": {"hidden_act": "gelu", "eos_token_id": 2},
    "one layer": {"num_hidden_layers": 1, "layer_norm_eps": 1e-3},
}


def torch_model(cls: Any, **changes: Any) -> Any:
    model = stable_diffusion.randomised(cls(CLIPTextConfig(**(TINY | changes))))
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    return model


def template(network: CLIPTextEncoder) -> Any:
    return jax.eval_shape(network.init, jax.random.key(0), TOKENS)["params"]


def load(folder: Path, **overrides: Any) -> tuple[CLIPTextEncoder, Any]:
    config = json.loads((folder / "config.json").read_text())
    network = CLIPTextEncoder.from_config(config, **overrides)
    return network, from_diffusers(
        read_weights(folder), template(network), ignore=UNUSED
    )


def encode(network: CLIPTextEncoder, params: Any) -> TextEncoding:
    return jax.jit(network.apply)({"params": params}, TOKENS)


def expected_of(model: Any) -> dict[str, np.ndarray | None]:
    with torch.no_grad():
        out = model(torch.tensor(TOKENS).long(), output_hidden_states=True)
    embeds, pooled = out.get("text_embeds"), out.get("pooler_output")
    return {
        "last_hidden_state": out.last_hidden_state.numpy(),
        "penultimate": out.hidden_states[-2].numpy(),
        "pooled": None if pooled is None else pooled.numpy(),
        "text_embeds": None if embeds is None else embeds.numpy(),
    }


def assert_equal(actual: TextEncoding, expected: dict[str, Any]) -> None:
    for name, array in expected.items():
        if array is not None:
            assert np.std(array) > 0.2
            given = getattr(actual, name)
            assert given.dtype == jnp.float32
            np.testing.assert_allclose(given, array, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cls", [CLIPTextModel, CLIPTextModelWithProjection])
def test_equals_transformers(cls: Any, name: str, tmp_path: Path):
    model = torch_model(cls, **CONFIGS[name])
    model.save_pretrained(tmp_path)
    network, params = load(tmp_path)
    assert network.with_projection == (cls is CLIPTextModelWithProjection)
    actual = encode(network, params)
    assert_equal(actual, expected_of(model))
    assert (actual.text_embeds is None) == (cls is CLIPTextModel)
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    for path, tensor in to_diffusers(params).items():
        np.testing.assert_array_equal(tensor, tensors.pop(path))
    assert not tensors


@pytest.mark.parametrize("with_projection", [False, True])
def test_flax_folders_give_what_flax_gives(with_projection: bool, tmp_path: Path):
    from transformers import FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection

    cls = CLIPTextModelWithProjection if with_projection else CLIPTextModel
    flax_cls = FlaxCLIPTextModelWithProjection if with_projection else FlaxCLIPTextModel
    model = torch_model(cls)
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    with stable_diffusion.lenient():
        flax_model = flax_cls(CLIPTextConfig(**TINY))
        params = from_diffusers(tensors, flax_model.params)
        expected = flax_model(TOKENS, params=params, output_hidden_states=True)
    flax_model.save_pretrained(tmp_path, params=params)
    assert not [*tmp_path.glob("*.safetensors")]
    network, ours = load(tmp_path, with_projection=with_projection)
    named = {
        "last_hidden_state": expected["last_hidden_state"],
        "penultimate": expected["hidden_states"][-2],
        "text_embeds": expected.get("text_embeds"),
        "pooled": expected.get("pooler_output"),
    }
    assert_equal(encode(network, ours), named)


def load_random(folder: Path) -> tuple[CLIPTextEncoder, Any]:
    torch_model(CLIPTextModelWithProjection).save_pretrained(folder)
    return load(folder)


def test_only_earlier_tokens_are_read(tmp_path: Path):
    network, params = load_random(tmp_path)
    changed = TOKENS.copy()
    changed[:, 6:] = 3
    first = encode(network, params).last_hidden_state
    other = jax.jit(network.apply)({"params": params}, changed).last_hidden_state
    np.testing.assert_array_equal(first[:, :6], other[:, :6])
    assert np.abs(first[:, 6:] - other[:, 6:]).max() > 0.1


def test_bfloat16_agrees_within_its_rounding(tmp_path: Path):
    network, params = load_random(tmp_path)
    exact = encode(network, params)
    rounded = encode(network.clone(dtype=jnp.bfloat16), params)
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.dtype == jnp.float32
        error = float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max())
        assert 1e-4 < error < 0.03


def test_half_precision_and_old_files_load(tmp_path: Path):
    """The latter hold the numbers of the positions, too."""
    from safetensors.numpy import load_file, save_file

    model = torch_model(CLIPTextModel).half()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(
        tensors | {"text_model.embeddings.position_ids": np.arange(12)[None]}, file
    )
    _, params = load(tmp_path)
    for name, tensor in to_diffusers(params).items():
        np.testing.assert_array_equal(tensor, tensors[name].astype(np.float32))


@pytest.mark.parametrize(
    "config, with_projection",
    [
        # Of Stable Diffusion 1.x, 2.x, and XL's second encoder.
        ({"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}, 0),
        (
            {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 23,
                "hidden_act": "gelu",
            },
            0,
        ),
        (
            {
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "num_attention_heads": 20,
                "num_hidden_layers": 32,
                "projection_dim": 1280,
                "hidden_act": "gelu",
            },
            1,
        ),
    ],
    ids=["sd 1", "sd 2", "sdxl"],
)
def test_full_size_has_the_parameters_of_pytorch(
    config: dict[str, Any], with_projection: int
):
    cls = CLIPTextModelWithProjection if with_projection else CLIPTextModel
    with torch.device("meta"):
        model = cls(CLIPTextConfig(**config))
    network = CLIPTextEncoder.from_config(config, with_projection=bool(with_projection))
    shapes = stable_diffusion.torch_shapes(template(network))
    assert shapes == {k: tuple(v.shape) for k, v in model.state_dict().items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "clip"},
            "model_type='clip' is not supported; use .*text_model",
        ),
        ({"use_attention_mask": True}, "use_attention_mask=True .* use False"),
        ({"hidden_act": "relu"}, "hidden_act='relu' .* use 'quick_gelu' or 'gelu'"),
        ({"num_attention_heads": 5}, "num_attention_heads=5 .* a divisor of hidden_s"),
        ({"vocab_size": 0}, "vocab_size=0 .* a positive integer"),
        ({"eos_token_id": [1, 2]}, "eos_token_id=.1, 2. .* ends a text"),
    ],
)
def test_refuses_what_it_would_compute_otherwise(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"CLIPTextEncoder: {message}"):
        CLIPTextEncoder.from_config(TINY | changes)


def test_refuses_more_tokens_than_positions():
    network = CLIPTextEncoder.from_config(TINY | {"max_position_embeddings": 11})
    with pytest.raises(
        ValueError, match="12 tokens; at most max_position_embeddings=11"
    ):
        template(network)
