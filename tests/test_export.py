"""The command's export: a distilled student in PyTorch, as a file, with its card."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from command import DIGITS, command, write_config
from finished_students import finished_student
from flax.traverse_util import flatten_dict

from boot_jax import pipeline, sharding
from boot_jax.config import default_config
from boot_jax.export import folder as export_folder
from boot_jax.export.card import Origin, model_card, read_licence
from boot_jax.export.diffusers import stock_model
from boot_jax.export.finished import ExportError
from boot_jax.objectives import Correction
from boot_jax.run import Run
from boot_jax.sharding import create_mesh

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()
diffusers.logging.disable_progress_bar()

ROOT = pathlib.Path(__file__).parents[1]
RUN = DIGITS.replace(
    "    return config\n",
    """
    config.data.name = ""
    config.teacher.source = "diffusers"
    config.objective.kind = "boot"
    config.objective.solver = "ddim"
    config.distill.update(
        num_steps=3, learning_rate=0.01, warmup_steps=0, ema_decay=0.5
    )
    config.run.update(steps_per_dispatch=1, tensorboard=False)
    return config
""",
)
LICENSED = "---\ntags:\n- x\nlicense: cc-by-4.0\n---\n# The teacher\n"


def save_imported_teacher(folder):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
    )
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    diffusers.DDIMPipeline(unet, scheduler).save_pretrained(folder)
    (folder / "README.md").write_text(LICENSED)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Flags and workdir of a small UNet after distillation and export."""
    folder = tmp_path_factory.mktemp("unet")
    save_imported_teacher(folder / "teacher")
    flags = (
        write_config(folder, RUN),
        f"--workdir={folder / 'run'}",
        f"--config.teacher.path={folder / 'teacher'}",
    )
    assert command(*flags, "--mode=distill") == 0
    assert command(*flags, "--mode=export") == 0
    return flags, folder / "run"


def run_of(workdir):
    """The run of a workdir, on one device."""
    config = default_config()
    config.update(json.loads((workdir / "config.json").read_text()))
    return Run(config, workdir, sharding.create_mesh())


def our_images(workdir, noise, condition=None):
    """Of our own sampler, from the checkpoint."""
    return np.asarray(
        pipeline.trained_pair(run_of(workdir)).student()(noise, condition)
    )


def test_the_folder_is_whole(exported, capsys):
    export = exported[1] / "export"
    names = {str(path.relative_to(export)) for path in export.rglob("*.*")}
    assert names == {
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "jax/student.jax_export",
        "jax/ema_params.safetensors",
        "jax/config.json",
    }
    beside = {path.name for path in exported[1].iterdir()}
    assert not {name for name in beside if name.startswith("export.")}


def test_pytorch_gives_the_image_of_our_sampler(exported):
    workdir = exported[1]
    noise = torch.randn((3, 1, 8, 8), generator=torch.Generator().manual_seed(5))
    ours = our_images(workdir, noise.permute(0, 2, 3, 1).numpy())
    for name in ("DDPMPipeline", "DDIMPipeline"):
        theirs = getattr(diffusers, name).from_pretrained(workdir / "export")
        theirs = theirs(
            batch_size=3,
            generator=torch.Generator().manual_seed(5),
            num_inference_steps=1,
            output_type="np",
        ).images
        shown = np.clip(ours / 2 + 0.5, 0, 1)
        assert np.mean((shown > 0) & (shown < 1)) > 0.5
        assert np.abs(shown - theirs).max() < 1e-4


@pytest.mark.slow
def test_a_latent_teacher_comes_in_and_its_student_goes_out(tmp_path):
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        num_layers=1,
        out_channels=8,  # with a learned variance
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=3,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False, prediction_type="v_prediction"
    )
    diffusers.DiTPipeline(transformer, vae, scheduler).save_pretrained(
        tmp_path / "teacher"
    )
    flags = (
        write_config(tmp_path, RUN),
        f"--workdir={tmp_path / 'run'}",
        f"--config.teacher.path={tmp_path / 'teacher'}",
        "--config.teacher.guidance_scale=3.0",
    )
    for mode in ("distill", "export"):
        assert command(*flags, f"--mode={mode}") == 0
    student = diffusers.DiTPipeline.from_pretrained(tmp_path / "run/export")
    theirs = student(
        class_labels=[2, 0],
        guidance_scale=1,
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=1,
        output_type="np",
    ).images
    noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    condition = {"label": np.asarray([2, 0], np.int32)}
    noise = noise.permute(0, 2, 3, 1).numpy()
    latents = our_images(tmp_path / "run", noise, condition)
    decoder = run_of(tmp_path / "run").teacher.decoder
    assert decoder is not None
    ours = np.asarray(decoder.decode(decoder.params, latents)) / 2 + 0.5
    assert ours.std() > 0.01
    assert np.abs(ours - theirs).max() < 1e-3
    card = (tmp_path / "run/export/README.md").read_text()
    assert "class_labels=[0], guidance_scale=1, num_inference_steps=1" in card
    assert "| latent | 8 x 8 x 4 |" in card and "VAE to decode" in card


def test_the_artefact_gives_the_bits_of_our_sampler(exported):
    workdir = exported[1]
    noise = np.random.default_rng(1).standard_normal((4, 8, 8, 1), np.float32)
    content = (workdir / "export/jax/student.jax_export").read_bytes()
    artifact = jax.export.deserialize(bytearray(content))
    ours = our_images(workdir, noise)
    assert np.asarray(artifact.call(noise)).tobytes() == ours.tobytes()


def test_the_weights_are_the_moving_average(exported):
    workdir = exported[1]
    tensors = safetensors.numpy.load_file(
        str(workdir / "export/jax/ema_params.safetensors")
    )
    pair = pipeline.trained_pair(run_of(workdir))
    expected = flatten_dict(jax.device_get(pair.params), sep="/")
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[name], expected[name]) for name in tensors)
    # It has been trained, away from the zeros that it starts with.
    assert np.any(tensors["added_embeddings/target_time/linear_2/kernel"])


def test_the_card_is_true(exported):
    card = (exported[1] / "export/README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\nlibrary_name: diffusers\n")
    assert "8 x 8 x 1" in card and "has not been evaluated" in card
    assert f"distilled from `{exported[1].parent / 'teacher'}`" in card
    assert "Inherited from the teacher's card: license cc-by-4.0" in card
    assert "from diffusers import DDIMPipeline" in card


@pytest.mark.slow
def test_the_cards_programs_run(exported):
    export = exported[1] / "export"
    programs = re.findall(
        r"```python\n(.*?)```", (export / "README.md").read_text(), re.S
    )
    assert len(programs) == 2
    for program in programs:
        done = subprocess.run(
            [sys.executable, "-c", program.replace("FOLDER", str(export))],
            cwd=export,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr


def test_an_interrupted_export_leaves_the_old_one(exported, monkeypatch, tmp_path):
    flags, workdir = exported
    before = (workdir / "export/jax/student.jax_export").read_bytes()

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_folder, "model_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(*flags, "--mode=export")
    assert (workdir / "export/jax/student.jax_export").read_bytes() == before
    monkeypatch.undo()
    (workdir / "export/jax/config.json").unlink()
    assert command(*flags, "--mode=export") == 0
    assert (workdir / "export/jax/config.json").exists()
    assert not list(workdir.glob("export.*"))


def test_without_a_student_there_is_nothing_to_export(tmp_path, capsys):
    config = write_config(tmp_path, RUN)
    where = f"--workdir={tmp_path / 'run'}", "--config.teacher.path=nowhere"
    assert command(config, *where, "--mode=export") == 2
    assert "there is no student" in capsys.readouterr().err


def write(folder, finished, said):
    return export_folder.write_export(
        folder,
        finished,
        config=default_config(),
        results=None,
        origin=Origin("a teacher", "0123"),
        warn=said.append,
    )


def test_a_network_that_diffusers_lacks_still_goes_out(tmp_path):
    said: list[str] = []
    finished = finished_student("dit", sample_shape=(8, 4, 2))
    write(tmp_path / "export", finished, said)
    (line,) = said
    assert "square images only" in line
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert names == {"README.md", "jax"}
    card = (tmp_path / "export/README.md").read_text()
    assert "library_name: jax" in card and "square images only" in card
    assert "no licence is stated" in card


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"):
        write(tmp_path / "file" / "export", finished_student("dit"), [])


@pytest.mark.parametrize(
    "text, expected",
    [
        (LICENSED, {"license": "cc-by-4.0"}),
        (
            "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
        ),
        ("# No front matter\nlicense: mit\n", {}),
        ("---\ntags: [x]\n---\nlicense: mit\n", {}),
    ],
)
def test_licences_are_read_from_front_matter_only(tmp_path, text, expected):
    (tmp_path / "README.md").write_text(text)
    assert read_licence(tmp_path) == expected


def test_no_card_no_licence(tmp_path):
    assert read_licence(tmp_path) == {}


def test_the_card_has_the_figures_and_the_guidance_scale():
    finished = finished_student("dit", num_classes=3, guidance_scale=2.0)
    config = default_config()
    config.teacher.guidance_range = (1.0, 4.0)
    scores = {"frechet_distance": 0.25, "normalized_error": 0.125}
    card = model_card(
        finished,
        config=config,
        results={
            "student": scores,
            "teacher": {"ddim": {"4": scores}, "ode": scores},
            "features": "pixels 8x8x1",
            "num_images": 64,
            "data": "the digits",
        },
        origin=Origin("a teacher", "0123"),
        stock=stock_model(finished),
    )
    assert "0.250" in card and "on 64 images, features pixels 8x8x1" in card
    assert "2 (it was trained on 1 to 4)" in card
    assert "class_labels=[0, 2]" in card and 'custom_pipeline="FOLDER"' in card


@pytest.mark.parametrize(
    "chosen, told, untold",
    [
        ({}, "More steps do not help", "correction of its samples"),
        (
            {"correction": Correction(strength=0.1)},
            "without training data, by bootstrapping along the teacher's ODE (Gu et "
            "al., [arXiv 2306.05544](https://arxiv.org/abs/2306.05544)), and a "
            "correction of its samples' distribution",
            "sample.steps",
        ),
        ({"start_times": (0.1, 1.0)}, "`sample.steps`", "More steps do not help"),
    ],
    ids=["plain", "corrected", "started"],
)
def test_the_card_says_how_the_student_was_made(chosen, told, untold):
    finished = finished_student("dit")
    objective = dataclasses.replace(finished.objective, **chosen)
    finished = dataclasses.replace(finished, objective=objective)
    card = model_card(
        finished,
        config=default_config(),
        results=None,
        origin=Origin("a teacher", "0123"),
        stock=stock_model(finished),
    )
    assert told in card and untold not in card
    strength = objective.correction.strength
    assert f"| strength of the correction | {strength:g} |" in card


def test_a_student_that_gives_noisy_images_is_not_exported(tmp_path):
    config = default_config()
    config.student.output = "noisy_image"
    run = Run(config, tmp_path, create_mesh())
    with pytest.raises(ExportError, match="output is 'noisy_image', but only students"):
        pipeline.export(run)
    assert not list(tmp_path.iterdir())
