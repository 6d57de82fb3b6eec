"""The UNet that reads texts, against diffusers' UNet2DConditionModel."""

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stable_diffusion
import torch
from diffusers import UNet2DConditionModel
from stable_diffusion import TINY, TINY_XL

from boot_jax.models.text_unet import TextUNet
from boot_jax.models.weights import (
    from_diffusers,
    read_weights,
    to_diffusers,
)

LINEAR = {"use_linear_projection": True, "upcast_attention": True}
ODD_BLOCKS: dict[str, Any] = {
    "block_out_channels": (20, 20, 40),
    "norm_num_groups": 5,
    "attention_head_dim": (5, 2, 10),
    "layers_per_block": (1, 2, 1),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd 1": TINY,
    "sd 1, heads of other sizes": TINY | {"attention_head_dim": (1, 16)},
    "sd 2": TINY | LINEAR | {"attention_head_dim": (2, 4), "layers_per_block": 2},
    "sdxl": TINY_XL,
    "sdxl's refiner": TINY_XL | {"projection_class_embeddings_input_dim": 5 * 8 + 24},
    "no block between": TINY | {"mid_block_type": None, "in_channels": 9},
    "deep": TINY | LINEAR | {"transformer_layers_per_block": 3},
    "odd blocks": TINY | ODD_BLOCKS | {"transformer_layers_per_block": (1, 3, 2)},
    "odd values": TINY
    | {
        "sample_size": (8, 16),
        "act_fn": "gelu",
        "norm_eps": 1e-4,
        "mid_block_scale_factor": 1.4,
        "downsample_padding": 0,
        "resnet_time_scale_shift": "scale_shift",
        "center_input_sample": True,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "time_embedding_dim": 48,
        "out_channels": 8,
    },
}
FLAX = ("sd 1", "sd 2", "sdxl")


def inputs(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Images NHWC, times and conditions for a config."""
    rng = np.random.default_rng(0)
    size = config["sample_size"]
    size = size if isinstance(size, tuple) else (size, size)
    condition = {"text": rng.normal(size=(2, 5, config["cross_attention_dim"]))}
    if config.get("addition_embed_type"):
        joined = config["projection_class_embeddings_input_dim"]
        ids = 6 if joined == TINY_XL["projection_class_embeddings_input_dim"] else 5
        width = joined - ids * config["addition_time_embed_dim"]
        condition["pooled"] = rng.normal(size=(2, width))
        condition["time_ids"] = rng.integers(0, 1024, size=(2, ids))
    x = rng.normal(size=(2, *size, config.get("in_channels", 4))).astype(np.float32)
    condition = {name: a.astype(np.float32) for name, a in condition.items()}
    return x, np.array([1.0, 741.0], np.float32), condition


def run_torch(
    model: UNet2DConditionModel, x: np.ndarray, time: np.ndarray, condition: Any
) -> np.ndarray:
    given = {name: torch.tensor(array) for name, array in condition.items()}
    text, added = given.pop("text"), None
    if given:
        added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
    images = torch.tensor(x).permute(0, 3, 1, 2)
    with torch.no_grad():
        out = model(images, torch.tensor(time), text, added_cond_kwargs=added).sample
    return out.permute(0, 2, 3, 1).numpy()


def template(network: TextUNet, *args: Any) -> Any:
    return jax.eval_shape(network.init, jax.random.key(0), *args)["params"]


def torch_model(config: dict[str, Any]) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return stable_diffusion.randomised(UNet2DConditionModel(**config))


SLOW = ("sd 1, heads of other sizes", "sdxl's refiner", "no block between", "deep")
SLOW += ("odd blocks",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CONFIGS],
)
def test_equals_diffusers(name: str, tmp_path: Path):
    model, args = torch_model(CONFIGS[name]), inputs(CONFIGS[name])
    model.save_pretrained(tmp_path)
    expected = run_torch(model, *args)
    network = TextUNet.from_config(json.loads((tmp_path / "config.json").read_text()))
    params = from_diffusers(read_weights(tmp_path), template(network, *args))
    actual = jax.jit(network.apply)({"params": params}, *args)
    assert 0.2 < np.std(expected) < 5
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAX)
def test_flax_weights_give_what_flax_gives_within_its_deviations(
    name: str, tmp_path: Path
):
    """Its GEGLU has the tanh GELU, and the norm ahead of a transformer 1e-5."""
    from diffusers import FlaxUNet2DConditionModel

    config, args = CONFIGS[name], inputs(CONFIGS[name])
    flax_keys = {k: v for k, v in config.items() if k != "upcast_attention"}
    torch_tensors = {k: v.numpy() for k, v in torch_model(config).state_dict().items()}
    x, time, condition = (jax.tree.map(jnp.asarray, part) for part in args)
    added = None
    if "pooled" in condition:
        added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
    with stable_diffusion.lenient():
        model = FlaxUNet2DConditionModel(**flax_keys)
        shapes = jax.eval_shape(model.init_weights, jax.random.key(0))
        params = from_diffusers(torch_tensors, shapes)
        expected = jax.jit(model.apply)(
            {"params": params}, x.transpose(0, 3, 1, 2), time, condition["text"], added
        ).sample
    model.save_pretrained(tmp_path, params=params)
    expected = np.asarray(expected).transpose(0, 2, 3, 1)
    network = TextUNet.from_config(json.loads((tmp_path / "config.json").read_text()))
    ours = from_diffusers(read_weights(tmp_path), template(network, *args))
    for path, tensor in to_diffusers(ours).items():
        np.testing.assert_array_equal(tensor, torch_tensors[path], err_msg=path)
    actual = jax.jit(network.apply)({"params": ours}, *args)
    assert np.std(expected) > 0.2
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["SD_1_5", "SD_2_1", "SDXL"])
def test_full_size_has_the_parameters_of_pytorch(name: str):
    """Without making them: every name and shape, and their number."""
    config = getattr(stable_diffusion, name)
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    network = TextUNet.from_config(config)
    condition = {"text": jnp.zeros((1, 77, network.cross_attention_dim))}
    if name == "SDXL":
        condition |= {"pooled": jnp.zeros((1, 1280)), "time_ids": jnp.zeros((1, 6))}
    size = config["sample_size"]
    shapes = template(network, jnp.zeros((1, size, size, 4)), jnp.zeros(1), condition)
    named = stable_diffusion.torch_shapes(shapes)
    assert named == {k: tuple(v.shape) for k, v in model.state_dict().items()}
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == sum(parameter.numel() for parameter in model.parameters())
    millions = {"SD_1_5": 859.5, "SD_2_1": 865.9, "SDXL": 2567.5}
    assert count / 1e6 == pytest.approx(millions[name], abs=0.05)


# Smaller than the above, for everything that needs no PyTorch.
SMALL = TextUNet.from_config(
    TINY_XL | {"block_out_channels": [8, 16], "norm_num_groups": 4, "dropout": 0.5}
)
ARGS = inputs(TINY_XL)
TEXT = {"text": ARGS[2]["text"]}
ONE_LEVEL = TextUNet(
    block_out_channels=(8,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("UpBlock2D",),
    mid_block_type=None,
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=2,
    cross_attention_dim=TINY["cross_attention_dim"],
)
ADDED = {"target_time": jnp.array([0.2, 0.9]), "guidance_scale": jnp.array([1.0, 0.0])}


def drawn(network: TextUNet, *args: Any) -> dict[str, Any]:
    """Random parameters; faster than the compilation of ``init``."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.3
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(mean, scale, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, template(network, *args))


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return drawn(SMALL, *ARGS)


@pytest.fixture(scope="module")
def output(params: Any) -> jax.Array:
    return jax.jit(SMALL.apply)({"params": params}, *ARGS)


def test_fields_have_the_names_and_defaults_of_diffusers():
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name != "self"}
    network = TextUNet()
    ours = {field for field in defaults if hasattr(network, field)}
    assert {name: getattr(network, name) for name in ours} == {
        name: defaults[name] for name in ours
    }
    assert TextUNet.from_config(defaults) == network  # the others are at "plain"
    assert len(ours) == 26
    assert hash(SMALL) == hash(SMALL.clone())


def test_bfloat16_agrees_within_its_rounding(params: Any, output: jax.Array):
    network = SMALL.clone(dtype=jnp.bfloat16)
    rounded = jax.jit(network.apply)({"params": params}, *ARGS)
    assert rounded.dtype == jnp.float32
    leaves = jax.tree.leaves(template(network, *ARGS))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    error = float(jnp.abs(rounded - output).max() / jnp.abs(output).max())
    assert 1e-4 < error < 0.05


def test_bfloat16_keeps_the_last_convolution_in_float32(params: Any):
    network = SMALL.clone(dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(network.apply)({"params": params}, *ARGS)
    convolutions = [
        eqn.outvars[0].aval.dtype
        for eqn in jaxpr.jaxpr.eqns
        if eqn.primitive.name == "conv_general_dilated"
    ]
    assert convolutions[-1] == jnp.float32
    assert set(convolutions[:-1]) == {jnp.dtype("bfloat16")}


def test_half_precision_files_become_float32(tmp_path: Path):
    model = torch_model(TINY).half()
    model.save_pretrained(tmp_path, variant="fp16")
    network, (x, time, condition) = TextUNet.from_config(TINY), inputs(TINY)
    read = read_weights(tmp_path)
    assert {tensor.dtype for tensor in read.values()} == {np.dtype("float16")}
    loaded = from_diffusers(read, template(network, x, time, condition))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}
    expected = {k: v.float().numpy() for k, v in model.state_dict().items()}
    for name, tensor in to_diffusers(loaded).items():
        np.testing.assert_array_equal(tensor, expected[name])


def test_added_embeddings_start_at_zero_and_have_a_derivative(
    params: Any, output: jax.Array
):
    network = SMALL.clone(added_embeddings=tuple(ADDED))
    added = drawn(network, *ARGS, ADDED)["added_embeddings"]
    x, time, condition = ARGS

    @jax.jit
    def at(params: Any, target_time: jax.Array) -> jax.Array:
        scalars = ADDED | {"target_time": target_time}
        return network.apply({"params": params}, x, time, condition, scalars)

    @jax.jit
    def slope(params: Any, t: jax.Array) -> jax.Array:
        return jax.jvp(functools.partial(at, params), (t,), (jnp.ones_like(t),))[1]

    t, step = ADDED["target_time"], 1e-2
    params = params | {"added_embeddings": added}
    derivative = slope(params, t)
    quotient = (at(params, t + step) - at(params, t - step)) / (2 * step)
    scale = float(jnp.abs(derivative).max())
    assert scale > 0.05
    np.testing.assert_allclose(derivative, quotient, atol=5e-3 * scale)
    start = jax.tree.map(jnp.zeros_like, {n: added[n]["linear_2"] for n in ADDED})
    zeroed = {n: added[n] | {"linear_2": start[n]} for n in ADDED}
    same = at(params | {"added_embeddings": zeroed}, t)
    np.testing.assert_allclose(same, output, rtol=1e-5, atol=1e-5)


def gradient(network: TextUNet) -> Any:
    def loss(params: Any) -> jax.Array:
        return jnp.mean(network.apply({"params": params}, *ARGS[:2], TEXT) ** 2)

    return jax.grad(loss)


@pytest.mark.slow
def test_remat_changes_no_gradient():
    params = drawn(ONE_LEVEL, *ARGS[:2], TEXT)
    plain = gradient(ONE_LEVEL)
    remat = gradient(ONE_LEVEL.clone(remat="nothing_saveable"))
    assert "remat" in str(jax.make_jaxpr(remat)(params))
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(same, jax.jit(remat)(params), jax.jit(plain)(params))


def test_dropout_acts_only_when_asked():
    network = ONE_LEVEL.clone(dropout=0.5)
    params = drawn(network, *ARGS[:2], TEXT)
    run = functools.partial(network.apply, {"params": params}, *ARGS[:2], TEXT)
    dropped = jax.jit(lambda key: run(deterministic=False, rngs={"dropout": key}))
    first, second = dropped(jax.random.key(0)), dropped(jax.random.key(1))
    assert jnp.abs(first - jax.jit(run)()).max() > 0.01
    assert jnp.abs(first - second).max() > 0.01


@pytest.mark.parametrize(
    ("field", "value", "supported"),
    [
        (
            "down_block_types",
            ["FlaxDownBlock2D", "DownBlock2D"],
            "CrossAttnDownBlock2D",
        ),
        (
            "down_block_types",
            ["AttnDownBlock2D", "DownBlock2D"],
            "CrossAttnDownBlock2D",
        ),
        ("up_block_types", ["UpBlock2D"], "one for each width"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2DCrossAttn"),
        ("downsample_padding", 2, "0 or 1"),
        ("act_fn", "tanh", "gelu"),
        ("resnet_time_scale_shift", "spatial", "scale_shift"),
        ("addition_embed_type", "image", "'text_time'"),
        ("addition_embed_type", "text_time", "a number"),
        ("norm_num_groups", 3, "a divisor of all"),
        ("norm_num_groups", None, "a positive integer"),
        ("cross_attention_dim", [24, 24], "a positive integer"),
        ("transformer_layers_per_block", [[1], [1, 2]], "a positive integer"),
        ("transformer_layers_per_block", [1, 1, 1], "one for each of"),
        ("attention_head_dim", 5, "numbers of heads that divide"),
        ("layers_per_block", 0, "a positive integer"),
        ("attention_implementation", "flash", "cudnn"),
        ("num_attention_heads", 8, "attention_head_dim"),
        ("only_cross_attention", True, "cross_attention_dim"),
        ("dual_cross_attention", True, "cross_attention_dim"),
        ("time_cond_proj_dim", 256, "cross_attention_dim"),
        ("num_class_embeds", 1000, "cross_attention_dim"),
        ("encoder_hid_dim", 4096, "cross_attention_dim"),
        ("attention_type", "gated", "cross_attention_dim"),
    ],
)
def test_refuses_what_it_would_compute_otherwise(
    field: str, value: Any, supported: str
):
    message = rf"TextUNet: \w+=.* is not supported; use .*{supported}"
    with pytest.raises(ValueError, match=message) as error:
        TextUNet.from_config(TINY | {field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        (ONE_LEVEL, {"condition": None}, "must have the entries .'text'., but has .."),
        (ONE_LEVEL, {"condition": ARGS[2]}, "has .'pooled', 'text', 'time_ids'."),
        (SMALL, {"condition": TEXT}, "must have the entries .'pooled', 'text', 'time"),
        (SMALL, {"x": ARGS[0][:, :7]}, "multiples of 2"),
        (SMALL, {"x": ARGS[0][..., :3]}, "C must be 4"),
        (SMALL, {"added": ADDED}, "given .'guidance_scale', 'target_time'"),
        (ONE_LEVEL, {"condition": {"text": ARGS[2]["text"][..., :7]}}, "is 7 wide"),
        (
            SMALL,
            {"condition": ARGS[2] | {"pooled": np.zeros((2, 9), np.float32)}},
            "pooled is 9 wide and 6 time_ids .*input_dim=68",
        ),
    ],
)
def test_refuses_inputs_that_do_not_fit(
    network: TextUNet, changes: dict[str, Any], message: str
):
    args = {"x": ARGS[0], "time": ARGS[1], "condition": ARGS[2]} | changes
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(network.init, **args), jax.random.key(0))
