"""Weights from and to PyTorch diffusers, through tensors, files and folders."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import UNet2DModel

from boot_jax.models.unet import UNet
from boot_jax.models.weights import (
    WeightsError,
    from_diffusers,
    read_safetensors,
    to_diffusers,
)

ATTENTION = "mid_block.attentions.0"


@pytest.fixture(scope="module")
def model() -> UNet2DModel:
    torch.manual_seed(0)
    model = UNet2DModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=3,
        time_embedding_type="fourier",
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def tensors(model: UNet2DModel) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def template(network: UNet, added: dict[str, jax.Array] | None = None) -> Any:
    x, time = jnp.zeros((2, 8, 8, 3)), jnp.ones(2)
    condition = {"label": jnp.zeros(2, jnp.int32)}
    key = jax.random.key(0)
    return jax.eval_shape(network.init, key, x, time, condition, added)["params"]


@pytest.fixture(scope="module")
def network(model: UNet2DModel) -> UNet:
    return UNet.from_config(dict(model.config))


@pytest.fixture(scope="module")
def params(network: UNet, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    return from_diffusers(tensors, template(network))


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(actual[name], tensor, strict=True, err_msg=name)


def outputs(
    model: UNet2DModel, network: UNet, params: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The images of both networks, for the same input."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    time, label = np.array([0.5, 3.0], np.float32), np.array([2, 0], np.int32)
    actual = jax.jit(network.apply)({"params": params}, x, time, {"label": label})
    with torch.no_grad():
        images = torch.tensor(x).permute(0, 3, 1, 2)
        expected = model(images, torch.tensor(time), torch.tensor(label)).sample
    return np.asarray(actual), expected.permute(0, 2, 3, 1).numpy()


def test_saved_folder_gives_the_same_images(model: UNet2DModel, tmp_path: Path):
    model.save_pretrained(tmp_path, safe_serialization=True)
    network = UNet.from_config(json.loads((tmp_path / "config.json").read_text()))
    params = from_diffusers(read_safetensors(tmp_path), template(network))
    actual, expected = outputs(model, network, params)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_round_trip_is_exact(params: Any, tensors: dict[str, np.ndarray]):
    assert_same(to_diffusers(params), tensors)


def test_pytorch_loads_our_export(model: UNet2DModel, network: UNet):
    shapes = template(network)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes
    )
    exported = {k: torch.tensor(v) for k, v in to_diffusers(params).items()}
    other = UNet2DModel(**dict(model.config)).eval()
    other.load_state_dict(exported, strict=True)
    actual, expected = outputs(other, network, params)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_kernels_are_transposed(params: Any, tensors: dict[str, np.ndarray]):
    kernel = params["down_blocks_0"]["resnets_0"]["conv1"]["kernel"]
    weight = tensors["down_blocks.0.resnets.0.conv1.weight"]
    assert kernel[2, 0, 5, 3] == weight[3, 5, 2, 0]
    linear = params["mid_block"]["attentions_0"]["to_out_0"]["kernel"]
    assert linear[5, 3] == tensors[f"{ATTENTION}.to_out.0.weight"][3, 5]
    assert kernel.flags.c_contiguous
    assert not np.shares_memory(kernel, weight)


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_old_attention_names(
    as_convolutions: bool, network: UNet, tensors: dict[str, np.ndarray]
):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for new_name, old_name in old.items():
            name = name.replace(f".{new_name}.", f".{old_name}.")
        if as_convolutions and name.split(".")[-2] in old.values() and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        renamed[name] = tensor
    assert f"{ATTENTION}.proj_attn.weight" in renamed
    assert_same(to_diffusers(from_diffusers(renamed, template(network))), tensors)


def test_every_misfit_is_listed(network: UNet, tensors: dict[str, np.ndarray]):
    wrong = dict(tensors)
    del wrong["conv_in.bias"], wrong["time_proj.weight"]
    wrong |= {"extra.weight": np.zeros(3), f"{ATTENTION}.query.bias": np.zeros(16)}
    wrong["conv_out.weight"] = np.zeros((8, 3, 3, 3))
    wrong["conv_norm_out.weight"] = np.zeros((1, 8))
    with pytest.raises(WeightsError) as error:
        from_diffusers(wrong, template(network))
    assert str(error.value) == (
        "these tensors do not fit the network; "
        "missing: conv_in.bias, time_proj.weight; "
        f"unexpected: extra.weight, {ATTENTION}.query.bias; "
        "of another shape: conv_norm_out.weight is (1, 8), not (8,), "
        "conv_out.weight is (8, 3, 3, 3), not (3, 8, 3, 3)"
    )


def test_ignored_parameters(network: UNet, tensors: dict[str, np.ndarray]):
    student = network.clone(added_embeddings=("target_time",))
    shapes = template(student, {"target_time": jnp.zeros(2)})
    with pytest.raises(WeightsError, match=r"missing: added_embeddings\.target"):
        from_diffusers(tensors, shapes)
    with_others = tensors | {"added_embeddings.other.weight": np.zeros(1)}
    params = from_diffusers(with_others, shapes, ignore=["added_embeddings"])
    assert params["added_embeddings"] == shapes["added_embeddings"]
    assert_same(to_diffusers(params, ignore=["added_embeddings"]), tensors)
    filled = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    own = "added_embeddings.target_time.linear_1.weight"
    assert to_diffusers(filled)[own].shape == (32, 5)


def test_ignoring_goes_by_whole_names(network: UNet, tensors: dict[str, np.ndarray]):
    lacking = {k: v for k, v in tensors.items() if not k.startswith("conv_in.")}
    shapes = template(network)
    with pytest.raises(WeightsError, match="missing: conv_in"):
        from_diffusers(lacking, shapes, ignore=["conv", "conv_i", "conv_in/kernel"])
    from_diffusers(lacking, shapes, ignore=["conv_in/bias", "conv_in/kernel"])


def test_bfloat16_files_load(model: UNet2DModel, network: UNet, tmp_path: Path):
    rounded = {k: v.bfloat16() for k, v in model.state_dict().items()}
    safetensors.torch.save_file(rounded, tmp_path / "half.safetensors")
    read = read_safetensors(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in read.values()} == {jnp.dtype("bfloat16")}
    loaded = to_diffusers(from_diffusers(read, template(network)))
    assert_same(loaded, {k: v.float().numpy() for k, v in rounded.items()})


def test_sharded_folder(
    model: UNet2DModel, tensors: dict[str, np.ndarray], tmp_path: Path
):
    model.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(read_safetensors(tmp_path), tensors)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    assert_same(read_safetensors(index), tensors)
    named = json.loads(index.read_text())
    named["weight_map"]["nowhere.weight"] = named["weight_map"]["conv_in.bias"]
    index.write_text(json.dumps(named))
    with pytest.raises(WeightsError, match=r"lack: .'nowhere\.weight'"):
        read_safetensors(index)


def test_folder_prefers_the_file_without_a_variant(tmp_path: Path):
    for name, value in (("model.fp16", 1.0), ("model", 2.0)):
        tensor = {"a": torch.tensor(value)}
        safetensors.torch.save_file(tensor, tmp_path / f"{name}.safetensors")
    assert read_safetensors(tmp_path)["a"] == 2.0


def test_unreadable_files_say_so(tmp_path: Path):
    with pytest.raises(WeightsError, match="holds none; name the file"):
        read_safetensors(tmp_path)
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        read_safetensors(tmp_path / "absent.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        read_safetensors(tmp_path / "cut.safetensors")
    (tmp_path / "a.safetensors.index.json").write_text("[]")
    with pytest.raises(WeightsError, match="is not an index"):
        read_safetensors(tmp_path)
    eight_bits = {"a": torch.zeros(2).to(torch.float8_e4m3fn)}
    safetensors.torch.save_file(eight_bits, tmp_path / "b.safetensors")
    with pytest.raises(WeightsError, match="float8"):
        read_safetensors(tmp_path / "b.safetensors")
