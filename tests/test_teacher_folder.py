"""Folders in diffusers format through the command: whole runs, and bad folders."""

import json
import pathlib
import pickle
import shutil
import sys
from collections.abc import Callable
from typing import Any

import huggingface_hub
import pipelines
import pytest
from command import command, write_config
from PIL import Image

from boot_jax.teachers.base import TeacherError
from boot_jax.teachers.folder import locate

CONFIG = """
from boot_jax.config import default_config


def get_config():
    config = default_config()
    config.data.name = ""
    config.teacher.source = "diffusers"
    config.distill.num_steps = 4
    config.distill.batch_size = 8
    config.distill.warmup_steps = 1
    config.objective.kind = "boot"
    config.objective.solver = "ddim"
    config.evaluation.update(
        num_images=8, num_real=8, batch_size=8, ddim_steps=(1, 2), ode_steps=2,
        error_times=2, error_images=8, grid_images=2,
    )
    config.run.update(
        log_every=2, checkpoint_every=4, steps_per_dispatch=2, tensorboard=False
    )
    return config
"""
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("good")
    pipelines.ddpm_pipeline(pipelines.unet()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(good, tmp_path / "pipeline")


def run(folder: Any, tmp_path: pathlib.Path, *arguments: str) -> int:
    return command(
        write_config(tmp_path, CONFIG),
        f"--workdir={tmp_path / 'run'}",
        f"--config.teacher.path={folder}",
        *arguments,
    )


def refused(capsys: Any, code: int) -> str:
    """The one line of a refusal."""
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def edit(file: pathlib.Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_index(folder: pathlib.Path) -> None:
    (folder / "model_index.json").unlink()


def index_is_a_list(folder: pathlib.Path) -> None:
    (folder / "model_index.json").write_text("[]")


def damaged_config(folder: pathlib.Path) -> None:
    (folder / "unet" / "config.json").write_text('{"sample_size": 8')


def without_config(folder: pathlib.Path) -> None:
    (folder / "unet" / "config.json").unlink()


def unknown_block(folder: pathlib.Path) -> None:
    blocks = ["SkipDownBlock2D", "AttnDownBlock2D"]
    edit(folder / "unet" / "config.json", down_block_types=blocks)


def wrong_type(folder: pathlib.Path) -> None:
    edit(folder / "unet" / "config.json", block_out_channels=8)


def without_size(folder: pathlib.Path) -> None:
    edit(folder / "unet" / "config.json", sample_size=None)


def odd_channels(folder: pathlib.Path) -> None:
    edit(folder / "unet" / "config.json", out_channels=5)


def truncated(folder: pathlib.Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def pickle_in_disguise(folder: pathlib.Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps({"weight": [0.0]}))


class Explosive:
    """Unpickling it would run a program."""

    def __reduce__(self) -> Any:
        return sys.exit, ("a pickle was opened",)


def only_a_pickle(folder: pathlib.Path) -> None:
    (folder / WEIGHTS).unlink()
    file = folder / "unet" / "diffusion_pytorch_model.bin"
    file.write_bytes(pickle.dumps(Explosive()))


def no_weights(folder: pathlib.Path) -> None:
    (folder / WEIGHTS).unlink()


def damaged_msgpack(folder: pathlib.Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "unet" / "diffusion_flax_model.msgpack").write_bytes(b"\x85\xa1")


def missing_shard(folder: pathlib.Path) -> None:
    (folder / WEIGHTS).unlink()
    shard = "diffusion_pytorch_model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": {"conv_in.bias": shard}}))


def shard_outside(folder: pathlib.Path) -> None:
    outside = {"weight_map": {"conv_in.bias": "../../elsewhere.safetensors"}}
    (folder / INDEX).write_text(json.dumps(outside))


def part_outside(folder: pathlib.Path) -> None:
    shutil.move(folder / "unet", folder.parent / "unet")
    index = json.loads((folder / "model_index.json").read_text())
    index["../unet"] = index.pop("unet")
    (folder / "model_index.json").write_text(json.dumps(index))


def absolute_part(folder: pathlib.Path) -> None:
    edit(folder / "model_index.json", **{"/etc": ["diffusers", "UNet2DModel"]})


def no_ode(folder: pathlib.Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    edit(file, _class_name="CMStochasticIterativeScheduler")


def unknown_spacing(folder: pathlib.Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    edit(file, timestep_spacing="sideways")


def unknown_betas(folder: pathlib.Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", beta_schedule="sigmoid")


def flow_sigmas(folder: pathlib.Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    edit(file, _class_name="UniPCMultistepScheduler", use_flow_sigmas=True)


def foreign_part(folder: pathlib.Path) -> None:
    edit(folder / "model_index.json", text_encoder=["transformers", "CLIPTextModel"])


def without_scheduler(folder: pathlib.Path) -> None:
    edit(folder / "model_index.json", scheduler=[None, None])


def missing_tensor(folder: pathlib.Path) -> None:
    edit(folder / "unet" / "config.json", num_class_embeds=3)


def labels_as_times(folder: pathlib.Path) -> None:
    edit(folder / "unet" / "config.json", class_embed_type="timestep")


BAD: dict[Callable[[pathlib.Path], None], str] = {
    without_index: "has no model_index.json",
    index_is_a_list: "holds no JSON object",
    damaged_config: "cannot be read",
    without_config: "has no config.json",
    unknown_block: "'SkipDownBlock2D' is not supported; use 'DownBlock2D' or",
    wrong_type: "config.json: ",
    without_size: "sample_size",
    odd_channels: "gives 5 channels for 3",
    truncated: "cannot be read as safetensors",
    pickle_in_disguise: "cannot be read as safetensors",
    only_a_pickle: "diffusion_pytorch_model.bin, a pickle; ",
    no_weights: "holds no weights",
    damaged_msgpack: "cannot be read as Flax parameters",
    missing_shard: "00002-of-00002.safetensors, but there is no such file",
    shard_outside: "'../../elsewhere.safetensors', which would lead out",
    part_outside: "'../unet', which would lead out of the folder",
    absolute_part: "'/etc', which would lead out of the folder",
    no_ode: "CMStochasticIterativeScheduler has no ODE",
    unknown_spacing: "timestep_spacing='sideways' is not supported; use 'leading' or",
    unknown_betas: "beta schedule 'sigmoid' is not known",
    flow_sigmas: "use_flow_sigmas=True is not supported",
    foreign_part: "is a CLIPTextModel, but its network, a UNet2DModel, takes no",
    without_scheduler: "one scheduler, but this one has unet",
    missing_tensor: "missing: class_embedding.weight",
    labels_as_times: "class_embed_type='timestep'",
}


@pytest.mark.parametrize("damage", BAD, ids=lambda damage: damage.__name__)
def test_a_bad_folder_is_refused_in_one_line(
    damage: Callable[[pathlib.Path], None],
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: Any,
):
    damage(folder)
    code = run(folder, tmp_path, "--mode=teacher")
    assert BAD[damage] in refused(capsys, code)


def test_the_good_folder_is_not_refused(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
):
    assert run(folder, tmp_path, "--mode=teacher") == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.data.channels=1"], "images of (8, 8, 3), but config.data says"),
        (["--config.data.image_size=16"], "says (16, 16, 3)"),
        (["--config.data.name=digits"], "says (8, 8, 1)"),
        (["--config.teacher.guidance_scale=3.0"], "guidance needs a class-conditional"),
        (["--config.teacher.null_label=True"], "no classes"),
        (["--config.teacher.path="], "teacher.path is empty; give the folder"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    arguments: list[str],
    message: str,
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: Any,
):
    code = run(folder, tmp_path, *arguments, "--mode=distill")
    assert message in refused(capsys, code)


def test_four_channels_do_not_fit_three(tmp_path: pathlib.Path, capsys: Any):
    model = pipelines.unet(in_channels=4, out_channels=4)
    pipelines.ddpm_pipeline(model).save_pretrained(tmp_path / "four")
    code = run(tmp_path / "four", tmp_path, "--config.data.channels=3")
    assert "images of (8, 8, 4), but config.data says (8, 8, 3)" in refused(
        capsys, code
    )


def test_guidance_needs_a_null_label(tmp_path: pathlib.Path, capsys: Any):
    model = pipelines.unet(num_class_embeds=3)
    pipelines.ddpm_pipeline(model).save_pretrained(tmp_path / "labelled")
    guided = "--config.teacher.guidance_scale=2.0"
    code = run(tmp_path / "labelled", tmp_path, guided, "--mode=distill")
    assert "teacher.null_label=True" in refused(capsys, code)


def test_latents_are_not_scored_against_images(tmp_path: pathlib.Path, capsys: Any):
    pipeline = pipelines.dit_pipeline(pipelines.dit(), pipelines.vae())
    pipeline.save_pretrained(tmp_path / "dit")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "a.png")
    images = ("--config.data.name=folder", f"--config.data.path={tmp_path}/images")
    code = run(tmp_path / "dit", tmp_path, *images, "--mode=teacher")
    assert "not yet scored against real ones" in refused(capsys, code)


def test_a_damaged_autoencoder_is_refused(tmp_path: pathlib.Path, capsys: Any):
    pipeline = pipelines.dit_pipeline(pipelines.dit(), pipelines.vae())
    pipeline.save_pretrained(tmp_path / "dit")
    edit(tmp_path / "dit" / "vae" / "config.json", norm_num_groups=3)
    code = run(tmp_path / "dit", tmp_path, "--mode=teacher")
    assert "vae/config.json: " in refused(capsys, code)
    edit(
        tmp_path / "dit" / "vae" / "config.json", norm_num_groups=4, layers_per_block=2
    )
    code = run(tmp_path / "dit", tmp_path, "--mode=teacher")
    assert "missing: decoder.up_blocks.0.resnets.2." in refused(capsys, code)


@pytest.mark.slow
def test_a_whole_run_of_a_unet(folder: pathlib.Path, tmp_path: pathlib.Path):
    assert run(folder, tmp_path) == 0
    assert (tmp_path / "run" / "report.html").exists()
    assert run(folder, tmp_path, "--mode=sample", "--num=2") == 0
    assert len([*(tmp_path / "run" / "samples" / "seed_0").glob("0*.png")]) == 2
    # Another teacher in the same place is another run.
    edit(folder / "scheduler" / "scheduler_config.json", beta_end=0.01)
    assert run(folder, tmp_path, "--mode=sample") == 2


def test_a_whole_run_of_a_guided_transformer(tmp_path: pathlib.Path):
    folder = tmp_path / "dit"
    model = pipelines.dit(num_layers=1)
    pipelines.dit_pipeline(model, pipelines.vae()).save_pretrained(folder)
    guided = ("--config.teacher.guidance_range=(1.0, 3.0)",)
    guided += ("--config.sample.guidance_scale=2.0",)
    assert run(folder, tmp_path, *guided, "--mode=distill") == 0
    label = "--config.sample.label=3"
    assert run(folder, tmp_path, *guided, label, "--mode=sample", "--num=2") == 0
    images = sorted((tmp_path / "run" / "samples").rglob("0*.png"))
    assert [Image.open(image).size for image in images] == [(16, 16)] * 2


def test_a_hub_id_is_read_from_the_cache(
    good: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any
):
    """Offline, as all tests are: the cache is as `huggingface_hub` writes it."""
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(good, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = locate("someone/tiny")
    assert (found / "model_index.json").exists()
    assert locate("someone/tiny", "main") == found
    with pytest.raises(TeacherError, match="cannot be fetched from the hub"):
        locate("someone/tiny", "another-branch")


def test_revision_is_passed_and_pickles_are_not_fetched(monkeypatch: Any):
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return "/fetched"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("someone/tiny", "v2") == pathlib.Path("/fetched")
    assert (asked["repository"], asked["revision"]) == ("someone/tiny", "v2")
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
    assert "token" not in asked  # the library's own


def test_offline_the_message_points_to_a_folder(tmp_path: pathlib.Path, capsys: Any):
    code = run("nobody/has-this", tmp_path, "--mode=teacher")
    line = refused(capsys, code)
    assert "nobody/has-this is no folder, and cannot be fetched from the hub" in line
    assert "hf download nobody/has-this --local-dir FOLDER" in line


def test_without_the_library_the_extra_is_named(monkeypatch: Any):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(TeacherError, match=r"install boot_jax\[diffusers\]"):
        locate("someone/tiny")
    with pytest.raises(TeacherError, match="it is no hub id"):
        locate("/nowhere/at/all")
