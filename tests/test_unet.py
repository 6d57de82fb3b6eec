"""The UNet against PyTorch diffusers' UNet2DModel, in float32 on the CPU."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from boot_jax.models.layers import REMAT_POLICIES, AddedEmbeddings
from boot_jax.models.unet import UNet
from boot_jax.models.weights import from_diffusers

TWO_LEVELS: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
THREE_LEVELS: dict[str, Any] = {
    "block_out_channels": (20, 20, 40),
    "norm_num_groups": 5,
    "attention_head_dim": 10,
    "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {"norm_num_groups": 32},
    "ddpm": {
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
        "layers_per_block": 2,
    },
    "fourier": {
        **PLAIN,
        "time_embedding_type": "fourier",
        "add_attention": False,
        "center_input_sample": True,
    },
    "labels": {"num_class_embeds": 5, "resnet_time_scale_shift": "scale_shift"},
    "labels as times": {
        "block_out_channels": (24, 48),
        "norm_num_groups": 3,
        "attn_norm_num_groups": 16,
        "class_embed_type": "timestep",
        "resnet_time_scale_shift": "scale_shift",
        "sample_size": (8, 16),
        "in_channels": 1,
        "out_channels": 2,
    },
    "labels as embeddings": {
        **THREE_LEVELS,
        "class_embed_type": "identity",
        "mid_block_scale_factor": 1.4,
        "act_fn": "gelu",
    },
    "resnet resampling": {
        **THREE_LEVELS,
        "mid_block_type": None,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "act_fn": "mish",
    },
    "learned": {
        "time_embedding_type": "learned",
        "num_train_timesteps": 1000,
        "time_embedding_dim": 48,
        "attention_head_dim": 12,  # two heads in 32 channels, and 8 channels left over
        "act_fn": "relu",
    },
}


def torch_model(config: dict[str, Any]) -> UNet2DModel:
    """A network none of whose parameters is at its start, with outputs of order 1."""
    torch.manual_seed(0)
    model = UNet2DModel(**config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.3)
            elif parameter.ndim == 1 and name != "time_proj.weight":
                parameter.normal_(0.0, 0.3)
    return model


def inputs(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Images NHWC, times and labels for a config."""
    rng = np.random.default_rng(0)
    size = config["sample_size"]
    size = size if isinstance(size, tuple) else (size, size)
    x = rng.normal(size=(3, *size, config.get("in_channels", 3)))
    is_fourier = config.get("time_embedding_type") == "fourier"
    times = [0.4, 1.0, 7.5] if is_fourier else [1.0, 350.0, 999.0]
    kind, labels = config.get("class_embed_type"), None
    if kind == "identity":
        width = 4 * config["block_out_channels"][0]
        labels = rng.normal(size=(3, width)).astype(np.float32)
    elif kind or "num_class_embeds" in config:
        labels = np.array([4, 0, 2], np.int32)
    return x.astype(np.float32), np.array(times, np.float32), labels


def run_torch(
    model: UNet2DModel, x: np.ndarray, time: np.ndarray, label: np.ndarray | None
) -> np.ndarray:
    is_learned = model.config["time_embedding_type"] == "learned"
    timesteps = torch.tensor(time, dtype=torch.long if is_learned else None)
    labels = None if label is None else torch.tensor(label)
    with torch.no_grad():
        out = model(torch.tensor(x).permute(0, 3, 1, 2), timesteps, labels).sample
    return out.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name: str):
    config = TWO_LEVELS | CONFIGS[name]
    model = torch_model(config)
    x, time, label = inputs(config)
    condition = None if label is None else {"label": label}
    expected = run_torch(model, x, time, label)
    network = UNet.from_config(dict(model.config))
    start = jax.eval_shape(network.init, jax.random.key(0), x, time, condition)
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    params = from_diffusers(tensors, start["params"])
    actual = jax.jit(network.apply)({"params": params}, x, time, condition)
    assert 0.2 < np.std(expected) < 5
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_fields_have_the_names_and_defaults_of_diffusers():
    parameters = inspect.signature(UNet2DModel.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name != "self"}
    network = UNet()
    assert {name: getattr(network, name) for name in defaults} == defaults


# Smaller than the above, for everything that needs no PyTorch.
SMALL = UNet.from_config(
    TWO_LEVELS | {"_class_name": "UNet2DModel", "block_out_channels": [8, 16]},
    norm_num_groups=4,
    dropout=0.5,
)
X = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
TIME = jnp.array([3.0, 700.0])
ADDED = {"target_time": jnp.array([0.2, 0.9]), "guidance_scale": jnp.array([1.0, 0.0])}
PLAIN_BLOCK = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
STUDENT = SMALL.clone(added_embeddings=tuple(ADDED))
ONE_LEVEL = SMALL.clone(block_out_channels=(8,), **PLAIN_BLOCK)


def drawn(network: UNet, *args: Any) -> dict[str, Any]:
    """Random parameters; faster than the compilation of ``init``."""
    template = jax.eval_shape(network.init, jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.3
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(mean, scale, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, template)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return drawn(SMALL, X, TIME)


@pytest.fixture(scope="module")
def output(params: Any) -> jax.Array:
    return jax.jit(SMALL.apply)({"params": params}, X, TIME)


@pytest.fixture(scope="module")
def added_params() -> Any:
    """The added embeddings as they start."""
    return AddedEmbeddings(tuple(ADDED), 32).init(jax.random.key(0), ADDED)["params"]


def test_config_lists_become_hashable():
    assert SMALL.block_out_channels == (8, 16)
    assert hash(SMALL) == hash(SMALL.clone())


def test_bfloat16_agrees_within_its_rounding(params: Any, output: jax.Array):
    network = SMALL.clone(dtype=jnp.bfloat16)
    jax.eval_shape(gradient(network), params)
    rounded = jax.jit(network.apply)({"params": params}, X, TIME)
    assert rounded.dtype == jnp.float32
    start = jax.eval_shape(network.init, jax.random.key(0), X, TIME)
    assert {leaf.dtype for leaf in jax.tree.leaves(start)} == {jnp.dtype("float32")}
    error = float(jnp.abs(rounded - output).max() / jnp.abs(output).max())
    assert 1e-4 < error < 0.03


def test_bfloat16_keeps_the_last_convolution_in_float32(params: Any):
    network = SMALL.clone(dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(network.apply)({"params": params}, X, TIME)
    convolutions = [
        eqn.outvars[0].aval.dtype
        for eqn in jaxpr.jaxpr.eqns
        if eqn.primitive.name == "conv_general_dilated"
    ]
    assert convolutions[-1] == jnp.float32
    assert set(convolutions[:-1]) == {jnp.dtype("bfloat16")}


def test_added_embeddings_start_at_zero(
    params: Any, added_params: Any, output: jax.Array
):
    variables = {"params": params | {"added_embeddings": added_params}}
    actual = jax.jit(STUDENT.apply)(variables, X, TIME, None, ADDED)
    np.testing.assert_allclose(actual, output, rtol=1e-5, atol=1e-6)


def gradient(network: UNet, *args: Any) -> Any:
    def loss(params: Any) -> jax.Array:
        return jnp.mean(network.apply({"params": params}, X, TIME, *args) ** 2)

    return jax.grad(loss)


def test_gradient_reaches_added_embeddings(added_params: Any):
    network = ONE_LEVEL.clone(added_embeddings=tuple(ADDED))
    params = drawn(ONE_LEVEL, X, TIME) | {"added_embeddings": added_params}
    reached = jax.jit(gradient(network, None, ADDED))(params)["added_embeddings"]
    for name in ADDED:
        assert jnp.abs(reached[name]["linear_2"]["kernel"]).max() > 1e-6
        assert jnp.abs(reached[name]["linear_1"]["kernel"]).max() == 0


def test_jvp_in_an_added_scalar_is_the_difference_quotient():
    params = drawn(STUDENT, X, TIME, None, ADDED)

    @jax.jit
    def at(target_time: jax.Array) -> jax.Array:
        scalars = ADDED | {"target_time": target_time}
        return STUDENT.apply({"params": params}, X, TIME, None, scalars)

    time, step = ADDED["target_time"], 1e-2
    _, derivative = jax.jit(lambda t: jax.jvp(at, (t,), (jnp.ones_like(t),)))(time)
    quotient = (at(time + step) - at(time - step)) / (2 * step)
    scale = float(jnp.abs(derivative).max())
    assert scale > 0.05
    np.testing.assert_allclose(derivative, quotient, atol=5e-3 * scale)


def test_vmap_over_images_is_the_batch(params: Any, output: jax.Array):
    def one(x: jax.Array, time: jax.Array) -> jax.Array:
        return SMALL.apply({"params": params}, x[None], time[None])[0]

    np.testing.assert_allclose(jax.jit(jax.vmap(one))(X, TIME), output, atol=1e-5)


@pytest.mark.parametrize("policy", REMAT_POLICIES[1:])
def test_remat_changes_no_gradient(policy):
    params = drawn(ONE_LEVEL, X, TIME)
    plain, remat = gradient(ONE_LEVEL), gradient(ONE_LEVEL.clone(remat=policy))
    assert "remat" in str(jax.make_jaxpr(remat)(params))
    assert "remat" not in str(jax.make_jaxpr(plain)(params))
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(same, jax.jit(remat)(params), jax.jit(plain)(params))


def test_dropout_acts_only_when_asked():
    params = drawn(ONE_LEVEL, X, TIME)

    @jax.jit
    def drop(key: jax.Array) -> jax.Array:
        return ONE_LEVEL.apply(
            {"params": params}, X, TIME, deterministic=False, rngs={"dropout": key}
        )

    without = ONE_LEVEL.clone(dropout=0.0)
    whole = jax.jit(without.apply)({"params": params}, X, TIME)
    default = jax.jit(ONE_LEVEL.apply)({"params": params}, X, TIME)
    first, second = drop(jax.random.key(0)), drop(jax.random.key(1))
    np.testing.assert_array_equal(default, whole)
    assert jnp.abs(first - whole).max() > 0.01
    assert jnp.abs(first - second).max() > 0.01


def test_fourier_frequencies_are_not_trained():
    network = ONE_LEVEL.clone(time_embedding_type="fourier")
    params = drawn(network, X, TIME)
    slope = jax.jit(gradient(network))(params)
    assert params["time_proj"]["weight"].shape == (8,)
    assert not slope["time_proj"]["weight"].any()
    assert slope["time_embedding"]["linear_1"]["kernel"].any()


@pytest.mark.parametrize(
    ("field", "value", "supported"),
    [
        ("down_block_types", ["KDownBlock2D", "DownBlock2D"], "AttnDownBlock2D"),
        ("up_block_types", ["SkipUpBlock2D", "UpBlock2D"], "ResnetUpsampleBlock2D"),
        ("down_block_types", ["DownBlock2D"], "one for each width"),
        ("mid_block_type", "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
        ("time_embedding_type", "sinusoidal", "positional"),
        ("num_train_timesteps", None, "a number"),
        ("downsample_padding", 2, "0 or 1"),
        ("downsample_type", "pool", "conv"),
        ("upsample_type", None, "resnet"),
        ("act_fn", "tanh", "gelu"),
        ("resnet_time_scale_shift", "spatial", "scale_shift"),
        ("class_embed_type", "projection", "timestep"),
        ("attention_implementation", "flash", "cudnn"),
        ("norm_num_groups", 3, "divisor"),
        ("attn_norm_num_groups", 48, "divisor"),
        ("norm_num_groups", None, "a positive integer"),
        ("attention_head_dim", 0, "None"),
        ("layers_per_block", [1, 2], "a positive integer"),
        ("cross_attention_dim", 768, "norm_eps"),
    ],
)
def test_refuses_what_it_would_compute_otherwise(
    field: str, value: Any, supported: str
):
    learned = {"time_embedding_type": "learned", "num_train_timesteps": 10}
    config = TWO_LEVELS | (learned if field == "num_train_timesteps" else {})
    message = f"UNet: {field}=.* is not supported; use .*{supported}"
    with pytest.raises(ValueError, match=message):
        UNet.from_config(config | {field: value})


@pytest.mark.parametrize(
    ("changes", "args", "message"),
    [
        ({}, (X[:, :7], TIME), "multiples of 2"),
        ({}, (X[..., :2], TIME), "C must be 3"),
        ({}, (X, TIME, {"label": TIME}), "has .'label'"),
        ({"num_class_embeds": 3}, (X, TIME), "must have the entries .'label'"),
        ({}, (X, TIME, None, {"guidance_scale": TIME}), "given .'guidance_scale'"),
        ({"attention_head_dim": 32}, (X, TIME), "is more than the 16 channels"),
    ],
)
def test_refuses_inputs_that_do_not_fit(changes: Any, args: Any, message: str):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(SMALL.clone(**changes).init, jax.random.key(0), *args)
