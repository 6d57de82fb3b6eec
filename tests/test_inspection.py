"""What inspection says is so: shapes, counts, costs that grow as they should."""

import json
import re
import shlex

import jax
import pytest
import text_pipelines
from command import DIGITS, command, write_config
from finished_students import DIT, random_params

from boot_jax import inspection
from boot_jax.config import default_config
from boot_jax.teachers import checkpoint as teacher_checkpoint
from boot_jax.tokenizers import WordTokenizer

SMALL = DIT | {"num_layers": 1}


def save_teacher(folder, **changes):
    description = teacher_checkpoint.describe(
        **{
            "network": "dit",
            "network_options": SMALL,
            "schedule": "cosine",
            "schedule_options": {"shift": 2.0},
            "prediction_type": "v_prediction",
            "sample_shape": (8, 8, 1),
            "num_classes": 3,
        }
        | changes
    )
    shapes = teacher_checkpoint.from_description(description).params
    teacher_checkpoint.save_teacher(folder, description, random_params(shapes))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def cost_of(folder, **distill):
    found = inspection.find(str(folder))
    found.config.distill.update(distill)
    run = inspection.Run(found.config, found.workdir, inspection.sharding.create_mesh())
    return run, inspection.step_cost(run)


def test_a_teacher_is_told_with_what_to_set(tmp_path, capsys):
    count = save_teacher(tmp_path / "teacher")
    flags = "--mode=inspect", f"--path={tmp_path / 'teacher'}", "--batch_size=8"
    assert command(*flags) == 0
    said = capsys.readouterr().out
    for words in (
        "a teacher of boot_jax",
        f"{count:,} in ",
        "8 x 8 x 1",
        "CosineSchedule(shift=2.0); alpha is 0 at t = 1",
        "v_prediction",
        "3 classes, can be guided",
        "a step of 8",
    ):
        assert words in said
    # The fields it names make a run of this very teacher, with nothing else set.
    config = write_config(tmp_path, DIGITS)  # which would train a teacher
    fields = [
        shlex.split(line, comments=True)[0]
        for line in said.splitlines()
        if line.startswith("--config.")
    ]
    run = f"--workdir={tmp_path / 'run'}"
    assert command(config, run, "--mode=teacher", *fields) == 0
    assert not (tmp_path / "run/teacher").exists()


def test_the_parts_add_up(tmp_path):
    count = save_teacher(tmp_path)
    said = inspection.inspect(str(tmp_path), batch_size=2)
    table = said.split("largest tensor\n")[1].split("\n\n")[0]
    rows = [re.split(r"\s{2,}", row.strip()) for row in table.splitlines()]
    assert sum(int(row[2].replace(",", "")) for row in rows) == count
    assert ["patch_embedding", "2", "80", "4 x 16"] in rows


def test_costs_follow_parameters_and_batch(tmp_path):
    count = save_teacher(tmp_path)
    run, small = cost_of(tmp_path, batch_size=4)
    _, large = cost_of(tmp_path, batch_size=8)
    assert small.teacher == 4 * count
    student = jax.eval_shape(run.student.init, jax.random.key(0))
    own = 4 * sum(leaf.size for leaf in jax.tree.leaves(student))
    # Parameters, average and two moments; and a few counters.
    assert 4 * own <= small.student < 4 * own + 64
    assert small.gradients == own
    assert 1.8 < large.flops / small.flops < 2.05
    assert 1.9 < large.activations / small.activations < 2.05
    # Every block keeps at least its tokens: images x tokens x width, in float32.
    assert small.activations > 4 * 16 * 16 * 4
    # Two calls of the student, one with its backward pass, and two of the teacher:
    # each reads the parameters of its matrices once for every token or image.
    assert small.flops > 2 * 4 * 2 * count


@pytest.mark.slow
def test_recomputing_blocks_keeps_less(tmp_path):
    save_teacher(tmp_path, network_options=DIT | {"num_layers": 3})
    config = default_config()
    costs = []
    for remat in ("none", "nothing_saveable"):
        config.network.remat = remat
        found = inspection.find(str(tmp_path), config)
        mesh = inspection.sharding.create_mesh()
        costs.append(
            inspection.step_cost(inspection.Run(found.config, found.workdir, mesh))
        )
    assert costs[1].activations < 0.5 * costs[0].activations
    assert costs[1].flops > costs[0].flops


def test_an_epsilon_teacher_gets_an_end_at_which_it_can_speak(tmp_path):
    save_teacher(tmp_path, prediction_type="epsilon", schedule_options={})
    said = inspection.inspect(str(tmp_path), batch_size=1)
    assert "--config.objective.t_max=0.99" in said


def test_a_workdir_says_how_far_it_is(tmp_path, capsys):
    save_teacher(tmp_path / "run/teacher", num_classes=None)
    config = default_config()
    config.title = "Half done"
    config.schedule.shift = 2.0
    config.data.name = "digits"
    (tmp_path / "run/config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "run/checkpoints/20").mkdir(parents=True)
    (tmp_path / "run/results.json").write_text("{}")
    assert command("--mode=inspect", f"--workdir={tmp_path / 'run'}") == 0
    said = capsys.readouterr().out
    assert "a workdir of boot_jax, 'Half done'" in said
    assert re.search(r"student +step 20 of 4,000", said)
    assert "results.json  there" in said
    assert "to distil it" not in said


def test_a_folder_in_diffusers_format(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    diffusers.logging.set_verbosity_error()
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
    )
    scheduler = diffusers.DDPMScheduler(clip_sample=True)
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    said = inspection.inspect(str(tmp_path), batch_size=2)
    for words in (
        "a teacher in diffusers format",
        f"{unet.num_parameters():,} in ",
        "8 x 8 x 3",
        "1000 betas, 0.0001 to 0.02; alpha is 0.00635 at t = 1",
        "epsilon",
        "clip",
        "--config.teacher.source=diffusers",
    ):
        assert words in said


@pytest.mark.parametrize(
    "files, words",
    [
        ({"notes.txt": ""}, "neither a teacher; model_index.json; nor a workdir"),
        ({"model.json": "{"}, "model.json cannot be read"),
        ({"model.json": "[]"}, "holds no JSON object"),
        ({"model.json": '{"format": "x"}'}, "was not written by boot_jax"),
        ({"config.json": '{"a": 1}'}, "is not a config of boot_jax"),
        (
            {"config.json": json.dumps(default_config().to_dict())},
            "teacher is not trained yet",
        ),
        (None, "there is no folder"),
    ],
)
def test_what_cannot_be_inspected_is_one_line(tmp_path, capsys, files, words):
    folder = tmp_path / "x y"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    assert command("--mode=inspect", f"--path={folder}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for word in words.split("; "):
        assert word in line


def test_something_must_be_named(capsys):
    assert command("--mode=inspect") == 2
    assert "--path=FOLDER" in capsys.readouterr().err
    assert command("--mode=export") == 2
    assert "--config=" in capsys.readouterr().err


def test_what_takes_prompts_says_so(tmp_path):
    """A Stable Diffusion pipeline, and a network that reads words itself."""
    text_pipelines.sd_pipeline().save_pretrained(tmp_path / "sd")
    said = inspection.inspect(str(tmp_path / "sd"), batch_size=2)
    assert re.search(r"conditions +prompts of 16 tokens", said)
    assert re.search(r"text encoder +[\d,]+ in \d+ tensors", said)
    assert "--config.prompts.path=FILE" in said
    words = WordTokenizer.from_prompts(["a red square", "a blue circle"])
    save_teacher(tmp_path / "words", num_classes=None, tokenizer=words)
    config = default_config()
    config.teacher.guidance_scale = 3.0
    said = inspection.inspect(str(tmp_path / "words"), config, batch_size=2)
    assert re.search(r"conditions +prompts of 3 tokens", said)
    assert re.search(r"text encoder +none", said)
