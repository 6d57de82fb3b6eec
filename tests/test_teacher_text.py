"""Teachers that take prompts: Stable Diffusion's and SDXL's folders against PyTorch."""

import json
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_pipelines
import torch
from text_pipelines import PROMPTS

from boot_jax.guidance import NEGATIVE_KEY, guide
from boot_jax.models.text_unet import TextUNet
from boot_jax.models.weights import WeightsError
from boot_jax.solvers import sample_ode, time_grid
from boot_jax.student import create_student
from boot_jax.teachers.base import Teacher, TeacherError, TextEncoder
from boot_jax.teachers.diffusers import load_teacher

KINDS = {"sd": text_pipelines.sd_pipeline, "sdxl": text_pipelines.sdxl_pipeline}
NEGATIVE = "painting"
STEPS, SCALE = 5, 2.5


@pytest.fixture(scope="module", params=KINDS)
def kind(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def made(kind: str, tmp_path_factory: Any) -> tuple[Any, pathlib.Path]:
    pipeline = KINDS[kind]()
    folder = tmp_path_factory.mktemp(kind)
    pipeline.save_pretrained(folder)
    return pipeline, folder


@pytest.fixture(scope="module")
def teacher(made: tuple[Any, pathlib.Path]) -> Teacher:
    return load_teacher(str(made[1]))


def text_of(teacher: Teacher) -> TextEncoder:
    assert teacher.text is not None
    return teacher.text


def condition_of(teacher: Teacher, prompts: list[str]) -> dict[str, Any]:
    text = text_of(teacher)
    tokens = np.asarray(text.tokenizer(prompts).ids)
    return jax.jit(text.encode)(text.params, tokens)


def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)


def drawn(pipeline: Any, **options: Any) -> np.ndarray:
    """PyTorch's images in [0, 1], from our noise."""
    return pipeline(
        PROMPTS,
        latents=torch.tensor(noise()).permute(0, 3, 1, 2),
        output_type="np",
        **options,
    ).images


@pytest.fixture(scope="module")
def sampler(teacher: Teacher) -> Callable[[str], np.ndarray]:
    """Our images for a negative prompt, by the teacher's own steps."""
    denoise = guide(teacher.denoise, NEGATIVE_KEY, SCALE)
    assert teacher.sampler_steps is not None and teacher.decoder is not None
    t, s = teacher.sampler_steps(STEPS)
    np.testing.assert_allclose([*t, s[-1]], time_grid(STEPS), atol=1e-6)
    decode, decoder_params = teacher.decoder.decode, teacher.decoder.params

    @jax.jit
    def run(params: Any, eps: Any, condition: Any) -> Any:
        def closed(x_t: Any, t: Any) -> Any:
            return denoise(params, x_t, t, condition)

        return sample_ode(closed, teacher.schedule, eps, time_grid(STEPS))

    def draw(negative: str) -> np.ndarray:
        null = condition_of(teacher, [negative] * 2)
        condition = condition_of(teacher, PROMPTS) | {NEGATIVE_KEY: null}
        latents = run(teacher.params, noise(), condition)
        return np.asarray(decode(decoder_params, latents)) / 2 + 0.5

    return draw


def test_conditions_are_those_of_the_pipeline(made: Any, teacher: Teacher):
    pipeline, _ = made
    given = condition_of(teacher, [*PROMPTS, ""])
    with torch.no_grad():
        encoded = pipeline.encode_prompt(
            prompt=[*PROMPTS, ""],
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
    np.testing.assert_allclose(given["text"][:2], encoded[0][:2], atol=1e-5)
    if "pooled" not in given:
        assert set(given) == {"text"}
        np.testing.assert_allclose(given["text"], encoded[0], atol=1e-5)
        return
    assert set(given) == {"text", "pooled", "time_ids"}
    np.testing.assert_allclose(given["pooled"][:2], encoded[2][:2], atol=1e-5)
    np.testing.assert_array_equal(given["time_ids"], [[16, 16, 0, 0, 16, 16]] * 3)
    # The pipeline takes zeros where no negative prompt is given, and so do we.
    assert not given["text"][2].any() and not given["pooled"][2].any()


def test_images_with_guidance_equal_pytorch(made: Any, sampler: Any):
    options = {"num_inference_steps": STEPS, "guidance_scale": SCALE}
    expected = drawn(made[0], **options)
    actual = sampler("")
    assert actual.shape == (2, 16, 16, 3)
    assert ((expected > 0) & (expected < 1)).mean() > 0.5
    np.testing.assert_allclose(actual, expected, atol=1e-3)
    other = drawn(made[0], negative_prompt=[NEGATIVE] * 2, **options)
    assert np.abs(expected - other).max() > 0.03
    np.testing.assert_allclose(sampler(NEGATIVE), other, atol=1e-3)


def test_what_a_folder_gives(teacher: Teacher, kind: str):
    assert teacher.sample_shape == (8, 8, 4)
    assert teacher.image_shape == (16, 16, 3)
    assert (teacher.num_classes, teacher.prediction_type) == (None, "epsilon")
    assert isinstance(teacher.network, TextUNet)
    length = text_pipelines.LENGTH
    expected = {"sd": (length,), "sdxl": (2, length)}
    assert text_of(teacher).tokenizer.row_shape == expected[kind]


@pytest.mark.slow
def test_a_student_starts_as_its_teacher(teacher: Teacher):
    student = create_student(teacher, guidance_range=(1.0, 4.0))
    params = student.init(jax.random.key(0))
    condition = condition_of(teacher, PROMPTS)
    told = condition | {"guidance_scale": jnp.array([1.0, 3.0])}
    run = jax.jit(student.signal)
    y = run(params, noise(), jnp.array([0.3, 0.8]), told)
    x_0 = jax.jit(teacher.denoise)(teacher.params, noise(), jnp.ones(2), condition)
    np.testing.assert_allclose(y, x_0, atol=1e-5 * float(jnp.abs(x_0).max()))


def test_loads_without_transformers_and_diffusers(
    made: Any, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
):
    for name in ("transformers", "diffusers", "torch", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    assert load_teacher(str(made[1])).fingerprint() == teacher.fingerprint()


@pytest.fixture
def copied(made: Any, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(made[1], tmp_path / "copied")


def edit(file: pathlib.Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


def drop(folder: pathlib.Path, *names: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    for name in names:
        del index[name]
    (folder / "model_index.json").write_text(json.dumps(index))


def refused(folder: pathlib.Path) -> str:
    with pytest.raises((TeacherError, WeightsError)) as error:
        load_teacher(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_parts_that_draw_nothing_are_ignored(copied: pathlib.Path, teacher: Teacher):
    others = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    }
    edit(copied / "model_index.json", **others)
    assert load_teacher(str(copied)).fingerprint() == teacher.fingerprint()


def test_early_configs_name_too_small_a_size(copied: pathlib.Path):
    unet = copied / "unet" / "config.json"
    edit(unet, _diffusers_version="0.8.1")
    assert load_teacher(str(copied)).image_shape == (128, 128, 3)
    edit(unet, _diffusers_version="0.9.0")
    assert load_teacher(str(copied)).image_shape == (16, 16, 3)


def test_missing_parts_are_named(copied: pathlib.Path):
    shutil.rmtree(copied / "tokenizer")
    assert "no tokenizer" in refused(copied)
    drop(copied, "tokenizer")
    message = refused(copied)
    assert message.startswith("the UNet needs tokenizer, text_encoder")
    drop(copied, "text_encoder")
    assert "text_encoder in its pipeline" in refused(copied).replace("_2", "")


def test_foreign_parts_are_named(copied: pathlib.Path):
    index = copied / "model_index.json"
    good = index.read_text()
    edit(index, text_encoder=["transformers", "T5EncoderModel"])
    assert "text_encoder is a T5EncoderModel" in refused(copied)
    index.write_text(good)
    edit(index, controlnet=["diffusers", "ControlNetModel"])
    assert "controlnet is a ControlNetModel" in refused(copied)
    index.write_text(good)
    edit(index, _class_name="StableDiffusionInpaintPipeline")
    message = refused(copied)
    assert "is a StableDiffusionInpaintPipeline" in message
    assert "StableDiffusionPipeline and StableDiffusionXLPipeline" in message
    index.write_text(good)
    edit(copied / "scheduler" / "scheduler_config.json", _class_name="LCMScheduler")
    assert "the scheduler LCMScheduler has no ODE" in refused(copied)


def test_parts_that_do_not_fit_are_named(copied: pathlib.Path):
    unet, clip = copied / "unet" / "config.json", copied / "text_encoder/config.json"
    good = unet.read_text(), clip.read_text()
    edit(unet, cross_attention_dim=32)
    assert "the UNet reads texts of cross_attention_dim=32" in refused(copied)
    unet.write_text(good[0])
    edit(clip, vocab_size=100)
    assert f"{text_pipelines.VOCABULARY} tokens, but" in refused(copied)
    clip.write_text(good[1])
    edit(clip, max_position_embeddings=8)
    assert "16 tokens; at most max_position_embeddings=8" in refused(copied)
    clip.write_text(good[1])
    edit(clip, hidden_act="relu")
    assert "text_encoder/config.json: CLIPTextEncoder: hidden_act" in refused(copied)
    clip.write_text(good[1])
    edit(copied / "vae" / "config.json", latent_channels=8)
    assert "decodes 8 channels, but the network makes 4" in refused(copied)
    edit(copied / "vae" / "config.json", latent_channels=4)
    next((copied / "text_encoder").glob("*.safetensors")).unlink()
    assert "text_encoder holds no weights" in refused(copied)


def test_sdxl_needs_a_projection_of_the_right_width(tmp_path: pathlib.Path):
    text_pipelines.sdxl_pipeline().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    good = index.read_text()
    edit(tmp_path / "unet" / "config.json", projection_class_embeddings_input_dim=64)
    assert "which with six sizes makes 68" in refused(tmp_path)
    edit(tmp_path / "unet" / "config.json", projection_class_embeddings_input_dim=68)
    edit(index, text_encoder_2=["transformers", "CLIPTextModel"])
    assert "unexpected: text_projection.weight" in refused(tmp_path)
    index.write_text(good)
    edit(index, force_zeros_for_empty_prompt=False)
    given = condition_of(load_teacher(str(tmp_path)), [""])
    assert jnp.abs(given["text"]).max() > 0.1
