"""Our own teachers' folders: they come back whole, or are refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from boot_jax.schedules import get_schedule
from boot_jax.teachers import checkpoint
from boot_jax.teachers.base import TeacherError
from boot_jax.tokenizers import WordTokenizer

SHAPE = (4, 4, 1)
NETWORKS = {
    "dit": {"patch_size": 2, "hidden_size": 16, "num_layers": 1, "num_heads": 2},
    "unet": {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    },
}


WORDS = WordTokenizer(["a", "blue", "hen"], length=4)


def description_of(name="dit", num_classes=None, tokenizer=None):
    return checkpoint.describe(
        network=name,
        network_options=NETWORKS[name],
        schedule="cosine",
        schedule_options={"shift": 2.0},
        prediction_type="v_prediction",
        sample_shape=SHAPE,
        num_classes=num_classes,
        tokenizer=tokenizer,
    )


def random_params(description, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype),
        checkpoint.from_description(description).params,
    )


@pytest.fixture
def folder(tmp_path):
    """A teacher on disk."""
    description = description_of()
    checkpoint.save_teacher(tmp_path, description, random_params(description))
    return tmp_path


def change(folder, edit):
    """Edits the tensors of a folder, a dict."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path)


def refusal_of(folder):
    with pytest.raises(TeacherError) as refusal:
        checkpoint.load_teacher(folder)
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("name, num_classes", [("dit", None), ("dit", 3), ("unet", 3)])
def test_a_teacher_comes_back(tmp_path, name, num_classes):
    description = description_of(name, num_classes)
    params = random_params(description)
    assert not checkpoint.exists(tmp_path / "new")
    checkpoint.save_teacher(tmp_path / "new", description, params)
    assert checkpoint.exists(tmp_path / "new")
    loaded = checkpoint.load_teacher(tmp_path / "new")
    given = checkpoint.from_description(description, params)
    assert loaded.schedule == get_schedule("cosine", shift=2.0)
    assert loaded.prediction_type == "v_prediction"
    assert loaded.sample_shape == SHAPE and loaded.num_classes == num_classes
    assert loaded.network == given.network
    assert loaded.fingerprint() == given.fingerprint()
    same = jax.tree.map(lambda a, b: bool((a == b).all()), loaded.params, params)
    assert all(jax.tree.leaves(same))
    x_t = jnp.asarray(np.random.default_rng(1).normal(size=(2, *SHAPE)), jnp.float32)
    t, label = jnp.asarray([0.2, 0.9]), {"label": jnp.asarray([0, 3], jnp.int32)}
    condition = None if num_classes is None else label
    np.testing.assert_array_equal(
        jax.jit(loaded.denoise)(loaded.params, x_t, t, condition),
        jax.jit(given.denoise)(params, x_t, t, condition),
    )


def test_a_teacher_with_text_comes_back(tmp_path):
    description = description_of(tokenizer=WORDS)
    params = random_params(description)
    checkpoint.save_teacher(tmp_path, description, params)
    loaded = checkpoint.load_teacher(tmp_path, dtype=jnp.bfloat16)
    assert loaded.text is not None and loaded.num_classes is None
    assert loaded.network.vocab_size == 5 and loaded.network.text_length == 4
    prompts = ["a blue hen", "a green hen"]
    ids = loaded.text.tokenizer(prompts).ids
    np.testing.assert_array_equal(ids, [[2, 3, 4, 0], [2, 1, 4, 0]])
    condition = loaded.text.encode(loaded.text.params, jnp.asarray(ids))
    np.testing.assert_array_equal(condition["tokens"], ids)
    # A network reads what the encoder gives, and heeds it.
    x_t = jnp.ones((2, *SHAPE))
    given = checkpoint.load_teacher(tmp_path)
    first, second = jax.jit(given.denoise)(params, x_t, jnp.ones(2) / 2, condition)
    assert float(jnp.abs(first - second).max()) > 1e-3
    fresh = checkpoint.initialiser(given.network, SHAPE, None)(jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)


def test_the_fingerprint_tells_vocabularies_apart():
    prints = []
    for words in (["a", "blue", "hen"], ["a", "hen", "blue"], ["a", "blue", "hen"]):
        description = description_of(tokenizer=WordTokenizer(words, length=4))
        params = random_params(description)
        prints.append(checkpoint.from_description(description, params).fingerprint())
    assert prints[0] == prints[2] != prints[1]


def test_a_description_without_text_is_what_it_was():
    """So that runs begun before there was text go on."""
    assert "text" not in description_of()
    assert checkpoint.from_description(description_of()).text is None


@pytest.mark.parametrize(
    "text, name, words",
    [
        ({"length": 4}, "dit", "an object with a vocabulary and a length"),
        ({"vocabulary": ["A"], "length": 4}, "dit", "single words in lower case"),
        (json.loads(WORDS.to_json()), "unet", "this unet reads no text; choose dit"),
    ],
)
def test_text_that_cannot_be_read_is_refused(folder, text, name, words):
    description = description_of(name) | {"text": text}
    (folder / "model.json").write_text(json.dumps(description))
    with pytest.raises(TeacherError, match=words) as refusal:
        checkpoint.load_teacher(folder)
    assert "model.json" in str(refusal.value) and "\n" not in str(refusal.value)


def test_labels_and_text_together_are_refused(folder):
    description = description_of(num_classes=3, tokenizer=WORDS)
    (folder / "model.json").write_text(json.dumps(description))
    with pytest.raises(TeacherError, match="a dit has labels or text"):
        checkpoint.load_teacher(folder)


def test_the_fingerprint_tells_teachers_apart():
    description = description_of()
    teachers = [
        checkpoint.from_description(description, random_params(description, seed))
        for seed in (0, 0, 1)
    ]
    other = description | {"schedule": {"name": "cosine", "shift": 1.0}}
    teachers.append(checkpoint.from_description(other, random_params(description)))
    other = description | {"prediction_type": "sample"}
    teachers.append(checkpoint.from_description(other, random_params(description)))
    prints = [teacher.fingerprint() for teacher in teachers]
    assert prints[0] == prints[1] and len(set(prints)) == 4


def test_a_loaded_teacher_may_compute_otherwise(folder):
    loaded = checkpoint.load_teacher(folder, dtype=jnp.bfloat16, remat="dots_saveable")
    assert (
        loaded.network.dtype == jnp.bfloat16 and loaded.network.remat == "dots_saveable"
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {
        np.dtype("float32")
    }
    image = jnp.ones((1, *SHAPE))
    full = checkpoint.load_teacher(folder)
    found, exact = (
        jax.jit(teacher.denoise)(teacher.params, image, jnp.ones(1) / 2, None)
        for teacher in (loaded, full)
    )
    assert found.dtype == jnp.float32
    assert 0 < float(jnp.abs(found - exact).max()) < 0.1


def test_sharded_parameters_are_saved_whole(tmp_path):
    from boot_jax import sharding

    description = description_of()
    params = random_params(description)
    mesh = sharding.create_mesh(-1, 4)
    split = sharding.place(
        params, sharding.parameter_shardings(params, mesh, min_size=1)
    )
    checkpoint.save_teacher(tmp_path, description, split)
    given = checkpoint.from_description(description, params)
    assert checkpoint.load_teacher(tmp_path).fingerprint() == given.fingerprint()


def test_no_folder_is_refused(tmp_path):
    message = refusal_of(tmp_path / "nowhere")
    assert "there is no teacher" in message
    assert "model.json" in message and "model.safetensors" in message


def test_half_a_folder_is_refused(folder):
    (folder / "model.json").unlink()
    assert not checkpoint.exists(folder)
    assert "there is no teacher" in refusal_of(folder)


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"architectures": ["Bert"]}', "not written by boot_jax"),
        ("[]", "not written by boot_jax"),
        ('{"format": "boot_jax teacher, version 9"}', "not written by boot_jax"),
        ("{", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_a_foreign_description_is_refused(folder, text, words):
    (folder / "model.json").write_text(text)
    assert words in refusal_of(folder)


def test_rubbish_weights_are_refused(folder):
    (folder / "model.safetensors").write_bytes(b"rubbish")
    assert "cannot be read" in refusal_of(folder)


@pytest.mark.parametrize(
    "part, value, words",
    [
        ("network", {"name": "mlp"}, "mlp"),
        ("network", {"name": "dit", "width": 3}, "width"),
        ("schedule", {"name": "cosin"}, "cosin"),
        ("sample_shape", None, "NoneType"),
    ],
)
def test_a_description_that_cannot_be_built_is_refused(folder, part, value, words):
    description = description_of() | {part: value}
    (folder / "model.json").write_text(json.dumps(description))
    with pytest.raises(TeacherError, match=words) as refusal:
        checkpoint.load_teacher(folder)
    assert "model.json" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_description_that_lacks_a_part_is_refused(folder):
    description = description_of()
    del description["prediction_type"]
    (folder / "model.json").write_text(json.dumps(description))
    with pytest.raises(TeacherError, match=r"model.json.*prediction_type"):
        checkpoint.load_teacher(folder)


def test_every_tensor_that_does_not_fit_is_named(folder):
    def spoil(tensors):
        tensors["patch_embedding/bias_2"] = tensors.pop("patch_embedding/bias")
        tensors["linear_out/bias"] = np.zeros(7, np.float32)

    change(folder, spoil)
    message = refusal_of(folder)
    assert "missing patch_embedding/bias;" in message
    assert "unexpected patch_embedding/bias_2" in message
    assert "linear_out/bias has shape (7,), not (4,)" in message


def test_a_network_of_another_width_is_refused(folder):
    description = description_of()
    description["network"]["hidden_size"] = 32
    (folder / "model.json").write_text(json.dumps(description))
    assert "patch_embedding/kernel has shape (4, 16), not (4, 32)" in refusal_of(folder)
