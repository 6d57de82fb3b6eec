"""The diffusion transformer: its start, its layout, its size, its precision."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from boot_jax.models.dit import DiT, DiTBlock, position_embedding
from boot_jax.models.layers import REMAT_POLICIES

X = np.random.default_rng(0).normal(size=(3, 4, 6, 2)).astype(np.float32)
TIME = np.array([0.0, 300.0, 1000.0], np.float32)
LABEL = {"label": np.array([0, 4, 5], np.int32)}
SIZES: dict[str, Any] = {
    "out_channels": 2,
    "patch_size": 2,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_classes": 5,
}


@functools.partial(jax.jit, static_argnums=0)
def run(network: DiT, params: Any, *args: Any) -> Any:
    return network.apply({"params": params}, *args)


@functools.partial(jax.jit, static_argnums=0)
def init(network: DiT) -> Any:
    added = dict.fromkeys(network.added_embeddings, TIME)
    return network.init(jax.random.key(0), X, TIME, LABEL, added)["params"]


def noisy(**options: Any) -> tuple[DiT, Any]:
    """A network of random parameters: at its start most of it would not show."""
    network = DiT(**(SIZES | options))
    rng = np.random.default_rng(1)
    return network, jax.tree.map(
        lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(init, network),
    )


def test_starts_as_the_zero_function():
    network = DiT(**SIZES)
    output = run(network, init(network), X, TIME, LABEL)
    np.testing.assert_array_equal(output, np.zeros((3, 4, 6, 2)))
    assert output.dtype == jnp.float32


def test_blocks_start_as_the_identity():
    block = DiTBlock(2, 4.0, None, jnp.float32)
    tokens = jnp.asarray(X.reshape(3, 6, 8))
    embedding = jnp.ones((3, 8))
    variables = jax.jit(block.init)(jax.random.key(0), tokens, embedding)
    output = jax.jit(block.apply)(variables, tokens, embedding)
    np.testing.assert_array_equal(output, tokens)


def to_torch(array: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(array))


def test_block_is_that_of_the_paper():
    """Modulated attention and perceptron with gates, rewritten in PyTorch."""
    block = DiTBlock(2, 3.0, None, jnp.float32)
    tokens = np.random.default_rng(3).normal(size=(2, 5, 8)).astype(np.float32)
    embedding = np.random.default_rng(4).normal(size=(2, 8)).astype(np.float32)
    shapes = jax.eval_shape(block.init, jax.random.key(0), tokens, embedding)["params"]
    rng = np.random.default_rng(5)
    params = jax.tree.map(
        lambda leaf: 0.4 * rng.normal(size=leaf.shape).astype(np.float32), shapes
    )

    def dense(given: Any, x: torch.Tensor) -> torch.Tensor:
        return x @ to_torch(given["kernel"]) + to_torch(given["bias"])

    def norm(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, (8,), eps=1e-6)

    x, c = to_torch(tokens), to_torch(embedding)
    parts = dense(params["modulation"], c)[:, None].chunk(6, dim=-1)
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
    h = norm(x) * (1 + scale_1) + shift_1
    given = params["attention"]
    q, k, v = (
        dense(given[name], h).reshape(2, 5, 2, 4).transpose(1, 2)
        for name in ("to_q", "to_k", "to_v")
    )
    h = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    x = x + gate_1 * dense(given["to_out"], h.transpose(1, 2).reshape(2, 5, 8))
    h = norm(x) * (1 + scale_2) + shift_2
    h = torch.nn.functional.gelu(dense(params["linear_1"], h), approximate="tanh")
    expected = x + gate_2 * dense(params["linear_2"], h)
    actual = jax.jit(block.apply)({"params": params}, tokens, embedding)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_patches_come_back_to_their_place():
    """With identities for both ends only the layout and a normalisation are left."""
    network = DiT(**(SIZES | {"hidden_size": 8, "num_heads": 1, "num_layers": 1}))
    params = init(network)
    for name in ("patch_embedding", "linear_out"):
        params[name] = {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}
    output = np.asarray(run(network, params, X, TIME, LABEL))
    position = position_embedding(2, 3, 8)
    for row in range(2):
        for column in range(3):
            place = np.s_[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            token = X[place].reshape(3, 8) + position[3 * row + column]
            token = token - token.mean(1, keepdims=True)
            token = token / np.sqrt((token**2).mean(1, keepdims=True) + 1e-6)
            patch = token.reshape(3, 2, 2, 2)
            np.testing.assert_allclose(output[place], patch, rtol=1e-4, atol=1e-5)


def test_position_embedding_is_of_row_and_column():
    embedding = position_embedding(3, 4, 8)
    assert (embedding.shape, embedding.dtype) == ((12, 8), np.float32)
    for row in range(3):
        for column in range(4):
            expected = []
            for place in (row, column):
                angles = [place, place / 100]  # Two waves: periods 2 pi and 200 pi.
                expected += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
            np.testing.assert_allclose(embedding[4 * row + column], expected, rtol=1e-6)


def count(options: dict[str, Any]) -> int:
    """Parameters by the layer table: weights and biases."""
    d, p, c = options["hidden_size"], options["patch_size"], X.shape[-1]
    time = 256 * d + d + d * d + d
    label = (options["num_classes"] + 1) * d
    attention = 4 * (d * d + d)
    perceptron = d * 4 * d + 4 * d + 4 * d * d + d
    block = attention + perceptron + d * 6 * d + 6 * d
    ends = p * p * c * d + d + d * p * p * 2 + p * p * 2
    return time + label + options["num_layers"] * block + ends + d * 2 * d + 2 * d


@pytest.mark.parametrize("options", [{}, {"hidden_size": 8, "num_layers": 3}])
def test_number_of_parameters(options):
    params = jax.eval_shape(init, DiT(**(SIZES | options)))
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    assert sum(sizes) == count(SIZES | options)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_labels_matter_once_trained():
    network = DiT(**SIZES)
    params = init(network)
    target = jnp.asarray(X[:, ::-1])

    @jax.jit
    def update(params: Any) -> Any:
        def loss(params: Any) -> Any:
            output = network.apply({"params": params}, X, TIME, LABEL)
            return jnp.mean((output - target) ** 2)

        grads = jax.grad(loss)(params)
        return jax.tree.map(lambda leaf, grad: leaf - 0.5 * grad, params, grads)

    def of_labels(params: Any) -> np.ndarray:
        """One image under every label, the null label 5 among them."""
        label = {"label": np.arange(6, dtype=np.int32)}
        x, time = np.tile(X[:1], (6, 1, 1, 1)), np.tile(TIME[1:2], 6)
        return np.asarray(run(network, params, x, time, label))

    # The last layer moves first, then what modulates it, then what is modulated by.
    outputs = []
    for _ in range(3):
        params = update(params)
        outputs.append(of_labels(params))
    assert np.isfinite(outputs).all()
    np.testing.assert_allclose(outputs[0], outputs[0][:1].repeat(6, 0), atol=1e-7)
    trained = outputs[-1].reshape(6, -1)
    apart = np.abs(trained[:, None] - trained[None]).max(-1)
    assert (apart[~np.eye(6, dtype=bool)] > 1e-6).all()


def test_time_and_added_scalars_matter():
    network, params = noisy(added_embeddings=("target_time",))
    added = {"target_time": jnp.asarray([0.1, 0.5, 0.9])}
    outputs = [
        np.asarray(run(network, params, X, time, LABEL, scalars))
        for time, scalars in (
            (TIME, added),
            (TIME + 50, added),
            (TIME, {"target_time": jnp.asarray([0.2, 0.5, 0.9])}),
        )
    ]
    assert (np.abs(outputs[1] - outputs[0]).max((1, 2, 3)) > 1e-4).all()
    moved = np.abs(outputs[2] - outputs[0]).max((1, 2, 3))
    assert moved[0] > 1e-4
    np.testing.assert_array_equal(moved[1:], 0)


def test_no_label_is_read_without_classes():
    network = DiT(**(SIZES | {"num_classes": None}))
    params = jax.eval_shape(init, network)
    assert "label_embedding" not in params
    output = jax.eval_shape(lambda params: run(network, params, X, TIME, None), params)
    assert output.shape == X.shape


def test_bfloat16_ends_in_float32():
    network, params = noisy()
    expected = run(network, params, X, TIME, LABEL)
    actual = run(network.clone(dtype=jnp.bfloat16), params, X, TIME, LABEL)
    assert actual.dtype == jnp.float32
    gap = np.abs(actual - expected).max() / np.abs(expected).max()
    assert 1e-5 < gap < 0.05
    # The last layer is not rounded to 8 bits.
    assert (np.asarray(actual) != np.asarray(actual.astype(jnp.bfloat16), "f")).any()


@pytest.mark.parametrize("policy", REMAT_POLICIES[1:])
def test_remat_changes_nothing(policy):
    network, params = noisy()
    remat = network.clone(remat=policy)

    def loss(network: DiT, params: Any) -> Any:
        return jnp.sum(jnp.sin(run(network, params, X, TIME, LABEL)))

    both = [
        jax.jit(jax.value_and_grad(functools.partial(loss, which)))(params)
        for which in (remat, network)
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *both
    )
    # It is there: the program keeps what is to be computed a second time.
    programs = [
        str(jax.make_jaxpr(functools.partial(loss, which))(params))
        for which in (remat, network)
    ]
    assert ["remat" in program or "checkpoint" in program for program in programs] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patch_size": 4}, "patch_size 4 must divide the image's 4x6"),
        ({"num_heads": 3}, "patch_size 2 must divide .* num_heads 3 hidden_size 16"),
        ({"hidden_size": 6}, "hidden_size is 6; a multiple of 4 is needed"),
        ({"added_embeddings": ("target_time",)}, "target_time"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(DiT(**(SIZES | options)).init, jax.random.key(0), X, TIME, LABEL)


# --- text

TOKENS = {"tokens": np.array([[2, 3, 4], [2, 4, 0], [0, 0, 0]], np.int32)}
TEXT: dict[str, Any] = {"num_classes": None, "vocab_size": 5, "text_length": 3}


def noisy_text(**options: Any) -> tuple[DiT, Any]:
    network = DiT(**(SIZES | TEXT | options))
    shapes = jax.eval_shape(network.init, jax.random.key(0), X, TIME, TOKENS)["params"]
    rng = np.random.default_rng(1)
    return network, jax.tree.map(
        lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes
    )


def test_text_adds_a_table_places_and_one_layer():
    without = jax.eval_shape(init, DiT(**(SIZES | {"num_classes": None})))
    network, params = noisy_text()
    added = {name: params[name] for name in params.keys() - without.keys()}
    sizes = {
        jax.tree_util.keystr(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(added)
    }
    assert sizes == {
        "['text_embedding']['embedding']": (5, 16),
        "['text_position']": (3, 16),
        "['text_linear']['kernel']": (16, 16),
        "['text_linear']['bias']": (16,),
    }
    shared = {name: params[name].keys() for name in without}
    assert shared == {name: leaf.keys() for name, leaf in without.items()}
    assert run(network, params, X, TIME, TOKENS).shape == X.shape


def test_text_starts_as_the_zero_function_too():
    network = DiT(**(SIZES | TEXT))
    params = jax.jit(network.init)(jax.random.key(0), X, TIME, TOKENS)["params"]
    output = run(network, params, X, TIME, TOKENS)
    np.testing.assert_array_equal(output, np.zeros(X.shape))


def test_every_word_and_its_place_matter():
    network, params = noisy_text()
    base = np.array([2, 3, 4], np.int32)
    rows = {
        "as it is": base,
        "first": [3, 3, 4],
        "second": [2, 4, 4],
        "last": [2, 3, 1],
        "padded": [2, 3, 0],
        "turned": base[::-1],
        "null": [0, 0, 0],
    }
    tokens = {"tokens": np.array(list(rows.values()), np.int32)}
    count = len(rows)
    x, time = np.tile(X[:1], (count, 1, 1, 1)), np.tile(TIME[1:2], count)
    outputs = np.asarray(run(network, params, x, time, tokens)).reshape(count, -1)
    apart = np.abs(outputs[:, None] - outputs[None]).max(-1)
    assert (apart[~np.eye(count, dtype=bool)] > 1e-3).all()


def test_the_order_of_words_reaches_the_image_through_attention_alone():
    """Their mean does not know it: without places in the sequence it is gone."""
    network, params = noisy_text()
    params = params | {"text_position": np.zeros_like(params["text_position"])}
    turned = {"tokens": TOKENS["tokens"][:, ::-1]}
    np.testing.assert_allclose(
        run(network, params, X, TIME, turned),
        run(network, params, X, TIME, TOKENS),
        atol=1e-4,
    )


def test_padding_is_not_in_the_mean():
    """With the attention shut, words act through their mean; padding adds nothing."""
    network, params = noisy_text()
    for index in range(SIZES["num_layers"]):
        attention = params[f"block_{index}"]["attention"]
        attention["to_out"] = jax.tree.map(np.zeros_like, attention["to_out"])
    rows = np.array([[2, 0, 0], [2, 2, 2], [0, 0, 2], [3, 0, 0]], np.int32)
    x, time = np.tile(X[:1], (4, 1, 1, 1)), np.tile(TIME[1:2], 4)
    same, repeated, moved, other = run(network, params, x, time, {"tokens": rows})
    np.testing.assert_allclose(repeated, same, atol=1e-5)
    np.testing.assert_allclose(moved, same, atol=1e-5)
    assert np.abs(other - same).max() > 1e-3
    # And the empty prompt is a mean of nothing, whatever stands for padding.
    empty = {"tokens": np.zeros((3, 3), np.int32)}
    table = params["text_embedding"]["embedding"].copy()
    table[0] = 7.0
    filled = params | {"text_embedding": {"embedding": table}}
    np.testing.assert_array_equal(
        run(network, filled, X, TIME, empty), run(network, params, X, TIME, empty)
    )


def test_text_in_bfloat16_with_remat_and_added_scalars():
    network, params = noisy_text(added_embeddings=())
    expected = run(network, params, X, TIME, TOKENS)
    other = network.clone(dtype=jnp.bfloat16, remat="dots_saveable")
    actual = run(other, params, X, TIME, TOKENS)
    assert actual.dtype == jnp.float32
    assert 1e-5 < np.abs(actual - expected).max() / np.abs(expected).max() < 0.05


def test_labels_and_text_together_are_refused():
    network = DiT(**(SIZES | TEXT | {"num_classes": 5}))
    with pytest.raises(ValueError, match="a dit has labels or text"):
        jax.eval_shape(network.init, jax.random.key(0), X, TIME, LABEL | TOKENS)
