"""Teachers run by diffusers' Flax classes, against our own reading of one folder."""

import json
import pathlib
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_pipelines
from text_pipelines import PROMPTS

from boot_jax.conditions import Conditions, prompt_encoder
from boot_jax.guidance import NEGATIVE_KEY, guide
from boot_jax.models.text_unet import TextUNet
from boot_jax.objectives import Objective
from boot_jax.solvers import sample_ode, time_grid
from boot_jax.student import create_student
from boot_jax.teachers import diffusers, flax_pipeline
from boot_jax.teachers.base import Teacher, TeacherError
from boot_jax.training.distillation import distillation_loss

SCALE = 2.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("flax")
    config = text_pipelines.ONE_LEVEL
    pipeline = text_pipelines.sd_pipeline(config)
    text_pipelines.save_flax(pipeline, folder, config)
    return folder


@pytest.fixture(scope="module")
def both(folder: pathlib.Path) -> tuple[Teacher, Teacher]:
    """As we read it, and as diffusers' classes run it."""
    return diffusers.load_teacher(str(folder)), flax_pipeline.load_teacher(str(folder))


def test_both_sources_know_the_same(both: tuple[Teacher, Teacher]):
    ours, theirs = both
    fields = "schedule sample_shape image_shape prediction_type thresholding network"
    for field in [*fields.split(), "sampler_steps", "num_classes"]:
        assert getattr(theirs, field) == getattr(ours, field), field
    assert isinstance(theirs.network, TextUNet)
    jax.tree.map(np.testing.assert_array_equal, theirs.params, ours.params)


def test_both_sources_read_prompts_alike(both: tuple[Teacher, Teacher]):
    prompts = [*PROMPTS, "", "word " * 40, "naïve café 1984, don't"]
    read = []
    for teacher in both:
        assert teacher.text is not None
        tokens = teacher.text.tokenizer(prompts)
        condition = jax.jit(teacher.text.encode)(teacher.text.params, tokens.ids)
        read.append((tokens, condition))
    (ours, our_condition), (theirs, their_condition) = read
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    np.testing.assert_array_equal(ours.truncated, theirs.truncated)
    assert theirs.truncated.tolist() == [False, False, False, True, False]
    assert their_condition.keys() == our_condition.keys() == {"text"}
    np.testing.assert_allclose(
        their_condition["text"], our_condition["text"], atol=1e-5
    )
    for teacher in both:
        assert teacher.text is not None
        tokenizer = teacher.text.tokenizer
        assert tokenizer.row_shape == (text_pipelines.LENGTH,)
        assert tokenizer.vocabulary_size == text_pipelines.VOCABULARY
        assert len(teacher.text.fingerprint()) == 16


def test_the_fingerprint_of_a_tokenizer_is_that_of_its_merges(folder: pathlib.Path):
    from transformers import CLIPTokenizer

    def fingerprint(path: pathlib.Path) -> str:
        made = CLIPTokenizer.from_pretrained(path)
        return flax_pipeline.PipelineTokenizer(made).fingerprint

    source, copy = folder / "tokenizer", folder / "other"
    shutil.copytree(source, copy)
    assert fingerprint(copy) == fingerprint(source)
    lines = (copy / "merges.txt").read_text().splitlines()
    (copy / "merges.txt").write_text("\n".join([*lines[:-1], "q q"]))
    assert fingerprint(copy) != fingerprint(source)
    shutil.rmtree(copy)


def test_both_sources_draw_the_same_images(both: tuple[Teacher, Teacher]):
    eps = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    images = []
    for teacher in both:
        assert teacher.text is not None and teacher.decoder is not None
        denoise = guide(teacher.denoise, NEGATIVE_KEY, SCALE)
        encode = prompt_encoder(teacher.text, "")
        tokens = teacher.text.tokenizer(PROMPTS).ids

        @jax.jit
        def run(
            params: Any,
            text: Any,
            tokens: Any,
            teacher: Any = teacher,
            denoise: Any = denoise,
            encode: Any = encode,
        ) -> Any:
            condition = encode(text, {"tokens": tokens})

            def closed(x_t: Any, t: Any) -> Any:
                return denoise(params, x_t, t, condition)

            return sample_ode(closed, teacher.schedule, eps, time_grid(4))

        latents = run(teacher.params, teacher.text.params, tokens)
        images.append(teacher.decoder.decode(teacher.decoder.params, latents))
    ours, theirs = images
    assert np.abs(ours[0] - ours[1]).max() > 0.05
    np.testing.assert_allclose(theirs, ours, atol=2e-3)


@pytest.mark.slow
def test_both_sources_teach_the_same(both: tuple[Teacher, Teacher]):
    """Loss and gradient of one step of distillation."""
    found = []
    for teacher in both:
        assert teacher.text is not None
        student = create_student(teacher)
        params = student.init(jax.random.key(0))
        loss = distillation_loss(
            signal=student.signal,
            denoise=guide(teacher.denoise, NEGATIVE_KEY, SCALE),
            schedule=teacher.schedule,
            objective=Objective(solver="ddim", delta=0.1),
            conditions=Conditions(),
            sample_shape=teacher.sample_shape,
            batch_size=2,
            encode=prompt_encoder(teacher.text, ""),
        )
        frozen = {"teacher": teacher.params, "text": teacher.text.params}
        tokens = jnp.asarray(teacher.text.tokenizer(PROMPTS).ids)

        @jax.jit
        def step(params: Any, frozen: Any, tokens: Any, loss: Any = loss) -> Any:
            def total(params: Any) -> Any:
                key = jax.random.key(1)
                return loss(params, params, frozen, {"tokens": tokens}, key, 0.5)

            return jax.value_and_grad(total, has_aux=True)(params)

        (value, _), gradient = step(params, frozen, tokens)
        found.append((float(value), gradient))
    (our_value, ours), (their_value, theirs) = found
    assert our_value > 1e-3
    assert their_value == pytest.approx(our_value, rel=1e-3)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(ours)))
    difference = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), ours, theirs)
    assert norm > 1e-3
    assert jnp.sqrt(sum(jax.tree.leaves(difference))) < 1e-3 * norm


def refused(folder: pathlib.Path) -> str:
    with pytest.raises(TeacherError) as error:
        flax_pipeline.load_teacher(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refusals_are_one_line(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    copied = shutil.copytree(folder, tmp_path / "copied")
    unet = copied / "unet" / "config.json"
    good = unet.read_text()
    xl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 68,
    }
    unet.write_text(json.dumps(json.loads(good) | xl))
    assert "is no Stable Diffusion pipeline" in refused(copied)
    unet.write_text(good)
    (copied / "unet" / "diffusion_flax_model.msgpack").unlink()
    message = refused(copied)
    assert "cannot read" in message and "set teacher.source='diffusers'" in message
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "install boot_jax[diffusers]" in refused(folder)


def test_loading_is_quiet(folder: pathlib.Path, capfd: Any):
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    teacher = flax_pipeline.load_teacher(str(folder))
    time = jnp.ones(1)
    condition = {"text": jnp.zeros((1, 3, 24))}
    jax.eval_shape(
        teacher.denoise, teacher.params, jnp.ones((1, 8, 8, 4)), time, condition
    )
    assert logging.get_verbosity() == logging.WARNING
    logging.set_verbosity(before)
    out, err = capfd.readouterr()
    assert not out and not err
