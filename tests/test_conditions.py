import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from boot_jax.conditions import Conditions, embedding_reader, prompt_encoder
from boot_jax.guidance import NEGATIVE_KEY, SCALE_KEY
from boot_jax.prompted import between_prompts
from boot_jax.teachers.base import TextEncoder
from boot_jax.tokenizers import Tokens


def test_nothing_is_drawn_without_classes():
    conditions = Conditions()
    assert conditions.draw(jax.random.key(0), 8) is None
    assert conditions.null() is None


def test_labels_are_uniform_over_the_classes():
    condition = Conditions(num_classes=7).draw(jax.random.key(0), 7000)
    assert set(condition) == {"label"}
    assert condition["label"].dtype == jnp.int32
    counts = np.bincount(condition["label"], minlength=7)
    assert len(counts) == 7  # Neither the null label nor any beyond it.
    assert chisquare(counts).pvalue > 1e-3


def test_the_null_label_is_the_one_after_the_last():
    null = Conditions(num_classes=7).null()
    np.testing.assert_array_equal(null["label"], [7])
    assert null["label"].dtype == jnp.int32


@pytest.mark.parametrize("low, high", [(1.0, 4.0), (2.0, 2.0)])
def test_guidance_scales_are_uniform_in_their_range(low, high):
    conditions = Conditions(num_classes=3, guidance_range=(low, high))
    condition = conditions.draw(jax.random.key(1), 2000)
    scale = np.asarray(condition[SCALE_KEY])
    assert scale.shape == (2000,)
    assert low <= scale.min() <= scale.max() <= high
    if high > low:
        assert kstest((scale - low) / (high - low), "uniform").pvalue > 1e-3
        # The labels say nothing about the scales: two streams out of one key.
        correlation = np.corrcoef(scale, np.asarray(condition["label"]))[0, 1]
        assert abs(correlation) < 0.1
    # Guidance is towards the class from the null label, which carries no scale.
    assert set(conditions.null()) == {"label"}


def test_given_labels_are_kept():
    conditions = Conditions(num_classes=9, guidance_range=(1.0, 2.0))
    label = jnp.asarray([8, 0, 3], jnp.uint8)
    condition = conditions.of_labels(label, jax.random.key(0))
    np.testing.assert_array_equal(condition["label"], [8, 0, 3])
    assert condition["label"].dtype == jnp.int32
    assert condition[SCALE_KEY].shape == (3,)


def test_draws_are_a_function_of_the_key_also_under_jit():
    conditions = Conditions(num_classes=5, guidance_range=(1.0, 3.0))
    drawn = conditions.draw(jax.random.key(3), 32)
    compiled = jax.jit(conditions.draw, static_argnums=1)(jax.random.key(3), 32)
    other = conditions.draw(jax.random.key(4), 32)
    for name in ("label", SCALE_KEY):
        np.testing.assert_allclose(compiled[name], drawn[name], rtol=1e-6)
        assert (np.asarray(other[name]) != np.asarray(drawn[name])).any()


# --- prompts


class Letters:
    """A tokenizer of letters, for what is done with tokens."""

    row_shape, vocabulary_size, fingerprint = (4,), 128, "letters"

    def __call__(self, prompts):
        ids = np.zeros((len(prompts), 4), np.int32)
        for row, prompt in enumerate(prompts):
            codes = [ord(letter) for letter in prompt[:4]]
            ids[row, : len(codes)] = codes
        return Tokens(ids, np.array([len(prompt) > 4 for prompt in prompts]))


TEXT = TextEncoder(
    tokenizer=Letters(),
    encode=lambda params, tokens: {
        "text": params["scale"] * tokens.astype(jnp.float32)[..., None],
        "pooled": tokens.sum(1, keepdims=True).astype(jnp.float32),
    },
    params={"scale": jnp.asarray(2.0)},
)
READ = {"tokens": jnp.asarray(Letters()(["ab", "c"]).ids), SCALE_KEY: jnp.ones(2)}


def test_prompts_become_what_the_encoder_makes_of_them():
    condition = prompt_encoder(TEXT, None)(TEXT.params, READ)
    assert set(condition) == {"text", "pooled", SCALE_KEY}
    np.testing.assert_array_equal(condition["text"][0, :, 0], [194, 196, 0, 0])
    np.testing.assert_array_equal(condition["pooled"], [[195], [99]])


def test_one_negative_prompt_serves_all():
    condition = prompt_encoder(TEXT, "z")(TEXT.params, READ)
    negative = condition[NEGATIVE_KEY]
    assert jax.tree.map(jnp.shape, negative) == {"text": (2, 4, 1), "pooled": (2, 1)}
    np.testing.assert_array_equal(negative["pooled"], [[122], [122]])


def test_a_prompts_own_negative_goes_first():
    own = {"negative_tokens": jnp.asarray(Letters()(["x", "yy"]).ids)}
    condition = prompt_encoder(TEXT, "z")(TEXT.params, READ | own)
    np.testing.assert_array_equal(condition[NEGATIVE_KEY]["pooled"], [[120], [242]])
    # Without guidance nobody is shown it.
    assert NEGATIVE_KEY not in prompt_encoder(TEXT, None)(TEXT.params, READ | own)


@pytest.mark.parametrize("own", [False, True])
def test_embeddings_made_before_give_the_same_condition(own):
    read = READ
    if own:
        read = read | {"negative_tokens": jnp.asarray(Letters()(["x", "yy"]).ids)}
    expected = prompt_encoder(TEXT, "z")(TEXT.params, read)
    made = {SCALE_KEY: read[SCALE_KEY]} | TEXT.encode(TEXT.params, read["tokens"])
    if own:
        negative = TEXT.encode(TEXT.params, read["negative_tokens"])
        made |= {f"negative_{name}": leaf for name, leaf in negative.items()}
    null = TEXT.encode(TEXT.params, jnp.asarray(Letters()(["z"]).ids))
    actual = embedding_reader(True)(null, made)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert NEGATIVE_KEY not in embedding_reader(False)(None, made)


def test_prompts_are_drawn_by_whoever_reads_them_and_scales_by_the_key():
    conditions = Conditions(guidance_range=(2.0, 4.0))
    drawn = conditions.draw(jax.random.key(0), 2, {"tokens": READ["tokens"]})
    assert set(drawn) == {"tokens", SCALE_KEY}
    again = conditions.draw(jax.random.key(0), 2, {"tokens": 0 * READ["tokens"]})
    np.testing.assert_array_equal(drawn[SCALE_KEY], again[SCALE_KEY])
    assert Conditions().draw(
        jax.random.key(0), 2, {"tokens": READ["tokens"]}
    ).keys() == {"tokens"}


def test_between_two_prompts_embeddings_go_in_a_straight_line():
    read = {
        "tokens": jnp.asarray(Letters()(["ab"] * 3).ids),
        "other_tokens": jnp.asarray(Letters()(["cd"] * 3).ids),
        "weight": jnp.asarray([0.0, 0.25, 1.0]),
    }
    pooled = between_prompts(prompt_encoder(TEXT, None))(TEXT.params, read)["pooled"]
    np.testing.assert_allclose(pooled[:, 0], [195, 196, 199])
