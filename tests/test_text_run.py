"""Text-to-image as a user runs it, at a tiny size: prompts in, images out."""

import itertools

import numpy as np
import pytest
from command import DIGITS, MIXTURE, command, write_config
from PIL import Image
from test_end_to_end import assert_same_state, saved_state

PROMPTS = ("a red square", "a small blue circle on white", "a green triangle")

SHAPES = DIGITS.replace(
    "    return config\n",
    """
    config.title = "Tiny shapes"
    config.data.name = "shapes"
    config.data.captions = True
    config.teacher.guidance_scale = 2.0
    config.objective.kind = "boot"
    config.evaluation.ddim_steps = (1,)
    config.run.tensorboard = False
    config.run.sample_images = 3
    return config
""",
)


def refused(capsys) -> str:
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: "), said
    return said[-1]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Of one run, done, whose grids are drawn at its middle and at its end."""
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]) + "\n")
    flags = (
        write_config(folder, SHAPES),
        f"--config.prompts.path={folder / 'prompts.txt'}",
        f"--workdir={folder / 'run'}",
        "--config.run.sample_every=20",
    )
    assert command(*flags, "--mode=distill") == 0
    return folder / "run", flags


def images(folder) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


@pytest.mark.slow
def test_the_report(flags):
    workdir, run = flags
    assert command(*run) == 0
    assert (workdir / "report.html").exists()


def test_grids_while_it_trains(flags):
    workdir, _ = flags
    grids = sorted(path.name for path in (workdir / "samples").glob("step_*.png"))
    assert grids == ["step_00000020.png", "step_00000040.png"]
    rows = [np.asarray(Image.open(workdir / "samples" / name)) for name in grids]
    # The teacher's rows, which come first, stay; the student's changes.
    third = len(rows[0]) // 3
    assert (rows[0][:third] == rows[1][:third]).all()
    assert (rows[0][-third:] != rows[1][-third:]).any()


def test_images_of_one_prompt_and_of_a_file(flags, tmp_path, capsys):
    workdir, run = flags
    assert command(*run, "--mode=sample", "--num=3", "--prompt=a red square") == 0
    (one,) = (workdir / "samples").glob("seed_0_prompts_*")
    assert len(images(one)) == 3
    told = (one / "prompts.txt").read_text().splitlines()
    assert told == [f"0000{index} a red square" for index in range(3)]
    (tmp_path / "two.txt").write_text(f"{PROMPTS[0]}\n{PROMPTS[1]}\n")
    file = f"--config.sample.prompts={tmp_path / 'two.txt'}"
    assert command(*run, "--mode=sample", "--num=3", file) == 0
    (two,) = set((workdir / "samples").glob("seed_0_prompts_*")) - {one}
    # Prompts in turn; image i of a seed and prompt is the same in either call.
    pairs = list(zip(images(one), images(two), strict=True))
    assert [(a == b).all() for a, b in pairs] == [True, False, True]
    assert "warning" not in capsys.readouterr().err


def test_a_sweep_of_prompts_under_one_noise(flags):
    workdir, run = flags
    options = (
        "--mode=sample",
        "--num=3",
        "--seed=5",
        "--config.sample.same_noise=True",
    )
    beside = "--config.sample.teacher_steps=(2,)"
    negative = "--negative_prompt=a cross"
    assert command(*run, *options, beside, negative) == 0
    folder = workdir / "samples" / "seed_5_same_noise"
    swept = images(folder)
    assert all((a != b).any() for a, b in itertools.combinations(swept, 2))
    with Image.open(folder / "animation.gif") as animation:
        assert animation.n_frames == 3
    plain = np.asarray(Image.open(folder / "beside_teacher.png"))
    assert command(*run, *options, beside) == 0
    again = np.asarray(Image.open(folder / "beside_teacher.png"))
    height = len(plain) // 2
    different = plain != again
    assert different[:height].any() and not different[height:].any()


def test_a_resumed_run_reads_the_same_prompts(flags, tmp_path):
    workdir, run = flags
    teacher = "--config.teacher.source=checkpoint"
    path = f"--config.teacher.path={workdir / 'teacher'}"
    run = (*run, "--mode=distill", teacher, path, "--config.run.sample_every=0")
    run = (*run, "--config.distill.decay=constant")
    whole, broken = (f"--workdir={tmp_path / name}" for name in ("whole", "broken"))
    assert command(*run, whole) == 0
    assert command(*run, broken, "--config.distill.num_steps=20") == 0
    assert command(*run, broken) == 0
    assert_same_state(
        saved_state(tmp_path / "whole", 40), saved_state(tmp_path / "broken", 40)
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (("--mode=distill", "--config.prompts.path="), "prompts.path is empty"),
        (("--mode=distill", "--config.prompts.path=none.txt"), "no file none.txt"),
        (("--mode=distill", "--config.prompts.embeddings=float32"), "embeddings"),
        (("--mode=sample", "--config.sample.prompt_to=x"), "sample.prompt_to needs"),
        (
            ("--mode=sample", "--prompt=a cross", "--config.sample.prompt_to=x"),
            "reads words itself",
        ),
        (("--mode=sample", "--negative_prompt=x"), "sample.teacher_steps"),
        (("--mode=sample", "--guidance_scale=2.0"), "was not trained on a range"),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, capsys, options, words):
    _, run = flags
    assert command(*run, *options, "--config.run.force=True") == 2
    assert words in refused(capsys)


def test_strange_words_are_named(flags, capsys):
    _, run = flags
    assert command(*run, "--mode=sample", "--num=1", "--prompt=a mauve square") == 0
    assert "the teacher never read mauve" in capsys.readouterr().err


def test_a_teacher_without_prompts_refuses_them(tmp_path, capsys):
    flags = (write_config(tmp_path, MIXTURE), f"--workdir={tmp_path / 'run'}")
    few = ("--config.distill.num_steps=2", "--config.run.checkpoint_every=2")
    assert command(*flags, *few, "--mode=distill", "--config.prompts.path=x") == 2
    assert "takes no prompts" in refused(capsys)
    assert command(*flags, *few, "--mode=distill", "--config.run.force=True") == 0
    assert command(*flags, *few, "--mode=sample", "--prompt=three") == 2
    assert "takes no prompts" in refused(capsys)


def test_captions_need_data_that_has_them(tmp_path, capsys):
    flags = (write_config(tmp_path, DIGITS), f"--workdir={tmp_path / 'run'}")
    assert command(*flags, "--config.data.captions=True") == 2
    assert "has no captions" in refused(capsys)
