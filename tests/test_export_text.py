"""Students of text pipelines in PyTorch diffusers: the same latents, the same image."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import text_pipelines
import torch
from command import DIGITS, command, write_config
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from finished_students import random_params
from text_pipelines import PROMPTS

from boot_jax.export import artifact
from boot_jax.export.diffusers import save_pipeline, stock_model
from boot_jax.export.finished import ExportError, FinishedStudent
from boot_jax.objectives import Objective
from boot_jax.schedules import get_schedule
from boot_jax.student import create_student
from boot_jax.teachers.base import Teacher
from boot_jax.teachers.diffusers import load_teacher
from boot_jax.teachers.folder import read_components

# How each pipeline's student is made: by prediction type, end, and drawn scales or not.
KINDS: dict[str, tuple[Any, str, float, float | None]] = {
    "sd": (StableDiffusionPipeline, "epsilon", 1.0, None),
    "sdxl": (StableDiffusionXLPipeline, "v_prediction", 0.9, 2.0),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(kind: str, tmp_path_factory: Any) -> pathlib.Path:
    folder = tmp_path_factory.mktemp(kind)
    prediction_type = KINDS[kind][1]
    if kind == "sd":
        pipeline = text_pipelines.sd_pipeline(
            text_pipelines.ONE_LEVEL, prediction_type=prediction_type
        )
    else:
        pipeline = text_pipelines.sdxl_pipeline(prediction_type=prediction_type)
    pipeline.save_pretrained(folder)
    return folder


def finished_student(source: pathlib.Path, kind: str) -> FinishedStudent:
    """A student of a teacher, whose new embeddings matter."""
    teacher = load_teacher(str(source))
    _, _, t_max, guidance_scale = KINDS[kind]
    student = create_student(
        teacher,
        t_max=t_max,
        guidance_range=None if guidance_scale is None else (1.0, 4.0),
    )
    params = student.init(jax.random.key(0))
    params["added_embeddings"] = random_params(params["added_embeddings"])
    return FinishedStudent(
        student=student,
        params=params,
        teacher=teacher,
        objective=Objective(t_max=t_max),
        guidance_scale=guidance_scale,
    )


@pytest.fixture(scope="module")
def finished(source: pathlib.Path, kind: str) -> FinishedStudent:
    return finished_student(source, kind)


@pytest.fixture(scope="module")
def exported(
    finished: FinishedStudent, source: pathlib.Path, tmp_path_factory: Any
) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("export")
    save_pipeline(folder, stock_model(finished, read_components(source)), None)
    return folder


def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)


def tokens_of(teacher: Teacher) -> np.ndarray:
    assert teacher.text is not None
    return np.asarray(teacher.text.tokenizer(PROMPTS).ids)


@pytest.fixture(scope="module")
def latents(finished: FinishedStudent) -> np.ndarray:
    tokens = tokens_of(finished.teacher)
    return np.asarray(jax.jit(finished)(finished.params, noise(), tokens))


@pytest.fixture(scope="module")
def images(finished: FinishedStudent, latents: np.ndarray) -> np.ndarray:
    """As our sampler gives them, in [0, 1]."""
    decoder = finished.teacher.decoder
    assert decoder is not None
    return np.asarray(decoder.decode(decoder.params, latents)) / 2 + 0.5


def load(folder: pathlib.Path, kind: str) -> Any:
    options = {"add_watermarker": False} if kind == "sdxl" else {}
    pipeline = KINDS[kind][0].from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: Any, **options: Any) -> np.ndarray:
    return pipeline(
        PROMPTS,
        latents=torch.tensor(noise()).permute(0, 3, 1, 2),
        num_inference_steps=1,
        **{"output_type": "np"} | options,
    ).images


def test_a_stock_pipeline_draws_our_images(
    exported: pathlib.Path, kind: str, latents: np.ndarray, images: np.ndarray
):
    pipeline = load(exported, kind)
    theirs = drawn(pipeline, guidance_scale=1.0)
    assert np.abs(theirs - images).max() < 1e-3
    assert np.abs(images[0] - images[1]).max() > 0.05
    raw = drawn(pipeline, guidance_scale=1.0, output_type="latent")
    raw = raw.permute(0, 2, 3, 1).numpy()
    assert np.abs(raw - latents).max() < 1e-4 * np.abs(latents).max()
    # What the pipeline does by default must not guide the student once more.
    again = drawn(pipeline, negative_prompt=["painting"] * 2)
    np.testing.assert_array_equal(again, theirs)
    with pytest.raises(ValueError, match="num_inference_steps"):
        pipeline(PROMPTS)


def test_text_still_counts(exported: pathlib.Path, kind: str, images: np.ndarray):
    pipeline = load(exported, kind)
    other = pipeline(
        PROMPTS[::-1],
        latents=torch.tensor(noise()).permute(0, 3, 1, 2),
        num_inference_steps=1,
        output_type="np",
    ).images
    assert np.abs(other - images).max() > 0.01


def test_no_config_is_out_of_date(exported: pathlib.Path, kind: str, recwarn: Any):
    load(exported, kind)
    outdated = [w for w in recwarn if "outdated" in str(w.message)]
    assert not outdated
    index = json.loads((exported / "model_index.json").read_text())
    assert index["_class_name"] == KINDS[kind][0].__name__
    assert {name for name, entry in index.items() if entry == [None, None]} >= {
        "feature_extractor"
    }


@pytest.mark.slow
def test_one_file_takes_tokens(finished: FinishedStudent, latents: np.ndarray):
    assert artifact.why_not(finished) == ""
    content = artifact.serialize(finished, ["cpu"])
    call = jax.export.deserialize(bytearray(content)).call
    given = jnp.asarray(tokens_of(finished.teacher))
    actual = call(jnp.asarray(noise()), given)
    np.testing.assert_allclose(actual, latents, atol=1e-4 * np.abs(latents).max())


def test_weights_too_large_for_one_file(
    finished: FinishedStudent, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(artifact, "MOST_BYTES", 1000)
    assert "one StableHLO file holds at most" in artifact.why_not(finished)


def test_parts_that_lack_are_named(finished: FinishedStudent, source: pathlib.Path):
    parts = read_components(source)
    del parts["tokenizer"], parts["vae"]
    with pytest.raises(ExportError, match="needs vae, tokenizer, which the teacher"):
        stock_model(finished, parts)


def test_a_flax_folder_goes_out_to_pytorch(tmp_path: pathlib.Path):
    """Its autoencoder and text encoder are written anew, in PyTorch's layout."""
    config = text_pipelines.ONE_LEVEL
    made = text_pipelines.sd_pipeline(config)
    source, folder = tmp_path / "flax", tmp_path / "export"
    text_pipelines.save_flax(made, source, config)
    finished = finished_student(source, "sd")
    folder.mkdir()
    save_pipeline(folder, stock_model(finished, read_components(source)), None)
    assert not [*folder.rglob("*.msgpack")]
    pipeline = load(folder, "sd")
    for name in ("vae", "text_encoder"):
        theirs = getattr(pipeline, name).state_dict()
        for key, tensor in getattr(made, name).state_dict().items():
            assert torch.equal(theirs[key], tensor), key
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert drawn(pipeline).shape == (2, 16, 16, 3)


RUN = DIGITS.replace(
    "    return config\n",
    """
    config.data.name = ""
    config.teacher.source = "flax_pipeline"
    config.teacher.guidance_scale = 2.0
    config.objective.kind = "boot"
    config.distill.update(num_steps=4, batch_size=8)
    config.run.update(steps_per_dispatch=2, tensorboard=False)
    return config
""",
)


@pytest.mark.slow
def test_a_whole_run_of_a_flax_pipeline_ends_in_pytorch(tmp_path: pathlib.Path):
    config = text_pipelines.ONE_LEVEL
    text_pipelines.save_flax(
        text_pipelines.sd_pipeline(config), tmp_path / "teacher", config
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    flags = (
        write_config(tmp_path, RUN),
        f"--config.teacher.path={tmp_path / 'teacher'}",
        f"--config.prompts.path={prompts}",
        f"--workdir={tmp_path / 'run'}",
    )
    assert command(*flags, "--mode=distill") == 0
    assert command(*flags, "--mode=export") == 0
    folder = tmp_path / "run" / "export"
    card = (folder / "README.md").read_text()
    assert 'pipeline("a small house by a river", num_inference_steps=1)' in card
    assert np.isfinite(drawn(load(folder, "sd"))).all()


def test_centred_input_has_no_place_for_a_scale(finished: FinishedStudent):
    """Which a flow has before its end."""
    teacher = dataclasses.replace(finished.teacher, schedule=get_schedule("flow"))
    network = finished.network.clone(center_input_sample=True)
    centred = dataclasses.replace(
        finished,
        teacher=teacher,
        student=dataclasses.replace(finished.student, network=network),
        objective=Objective(t_max=0.9),
    )
    with pytest.raises(ExportError, match=r"center_input_sample.*t_max=1"):
        stock_model(centred)
