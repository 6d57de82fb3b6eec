"""Whole runs, at a tiny size: what they leave behind, and how they go on."""

import importlib
import io
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from command import DIGITS, MIXTURE, command, write_config
from PIL import Image

from boot_jax.training import logs

ROOT = pathlib.Path(__file__).parents[1]
SCORES = {"frechet_distance", "normalized_error", "precision", "recall"}


def saved_state(folder: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, read without our code."""
    path = folder / "checkpoints" / str(step) / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(path).item_metadata.tree
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one),
            shapes,
        )
        tree = checkpointer.restore(path, target)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}


def assert_same_state(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    # Parameters, their average and both moments of the optimizer are among them.
    for part in ("params", "ema_params", "mu", "nu", "step"):
        assert any(part in name for name in a)
    different = [name for name in a if a[name].tobytes() != b[name].tobytes()]
    assert not different


def steps_of(folder: pathlib.Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image, float)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny digits run, in its default mode; gives its flags and its workdir."""
    folder = tmp_path_factory.mktemp("tiny")
    flags = write_config(folder, DIGITS), f"--workdir={folder / 'run'}"
    assert command(*flags) == 0
    return flags, folder / "run"


@pytest.fixture(scope="module")
def results(tiny):
    return json.loads((tiny[1] / "results.json").read_text())


def test_a_run_leaves_all_of_its_parts_behind(tiny):
    workdir = tiny[1]
    for name in (
        "config.json",
        "results.json",
        "report.html",
        "metrics.jsonl",
        "samples/grid.png",
        "checkpoints/20",
        "checkpoints/40",
        "teacher/model.json",
        "teacher/model.safetensors",
        "teacher/metrics.jsonl",
    ):
        assert (workdir / name).exists(), name
    assert steps_of(workdir) == steps_of(workdir / "teacher") == [10, 20, 30, 40]
    assert list((workdir / "tensorboard").glob("events*"))
    config = json.loads((workdir / "config.json").read_text())
    assert config["network"]["dit"]["hidden_size"] == 32
    assert not list(workdir.rglob("*.partial"))


def test_results_have_what_is_promised(results):
    assert set(results["student"]) >= SCORES
    assert set(results["teacher"]["ddim"]) == {"1", "2", "4"}
    for scores in (results["student"], *results["teacher"]["ddim"].values()):
        assert set(scores) >= SCORES
        intervals = scores["intervals"]
        assert all(np.isfinite(v) for k, v in scores.items() if k != "intervals")
        assert set(intervals) >= SCORES - {"seconds_per_image"}
        for name, (low, high) in intervals.items():
            assert low <= scores[name] <= high
    assert 1 <= results["ddim_equivalent_steps"] <= 4
    assert set(results["seconds"]) == {"teacher", "distill", "evaluate"}
    assert all(seconds > 0 for seconds in results["seconds"].values())
    assert results["versions"]["jax"] == jax.__version__
    assert results["versions"]["python"].startswith("3.")
    assert results["num_images"] == 64 and "digits" in results["data"].lower()
    errors = [
        scores["normalized_error"] for scores in results["teacher"]["ddim"].values()
    ]
    assert errors == sorted(errors, reverse=True)


def test_the_report_shows_the_run(tiny, results):
    page = (tiny[1] / "report.html").read_text()
    assert "Tiny digits" in page and page.count("data:image/png;base64,") >= 4
    assert f"{results['student']['frechet_distance']:.3f}" in page


def test_the_grid_is_an_image_of_samples(tiny):
    with Image.open(tiny[1] / "samples" / "grid.png") as grid:
        assert min(grid.size) > 64 and len(set(np.asarray(grid).ravel())) > 20


def test_running_again_trains_nothing(tiny, capsys, monkeypatch):
    flags, workdir = tiny

    def kept():
        names = ("metrics.jsonl", "teacher/model.safetensors", "teacher/metrics.jsonl")
        return [(workdir / name).read_bytes() for name in names]

    before = saved_state(workdir, 40), kept()

    def no_logger(*args, **kwargs):
        raise AssertionError("something was trained")

    monkeypatch.setattr(logs.Logger, "__init__", no_logger)
    assert command(*flags, "--mode=distill") == 0
    assert str(workdir / "checkpoints") in capsys.readouterr().out
    assert command(*flags, "--mode=teacher") == 0
    assert kept() == before[1]
    assert_same_state(saved_state(workdir, 40), before[0])


def test_an_evaluation_can_be_repeated_otherwise(tiny, results):
    flags, workdir = tiny
    kept = (workdir / "results.json").read_bytes()
    few = ("--config.evaluation.num_images=32", "--config.evaluation.ddim_steps=(1,)")
    assert command(*flags, "--mode=evaluate", *few) == 0
    again = json.loads((workdir / "results.json").read_text())
    assert again["num_images"] == 32 and set(again["teacher"]["ddim"]) == {"1"}
    (workdir / "results.json").write_bytes(kept)


def test_samples_are_a_function_of_the_seed(tiny, capsys):
    flags, workdir = tiny
    assert command(*flags, "--mode=sample", "--num=5", "--seed=3") == 0
    folder = workdir / "samples" / "seed_3"
    assert str(folder) in capsys.readouterr().out
    first = contents(folder)
    assert list(first) == [*(f"{index:05d}.png" for index in range(5)), "grid.png"]
    assert len(set(first.values())) == 6
    with Image.open(folder / "00000.png") as image:
        assert image.size == (8, 8) and image.mode == "L"
    assert command(*flags, "--mode=sample", "--num=5", "--seed=3") == 0
    assert contents(folder) == first
    # Other batches, other numbers of images: the same images.
    other = ("--num=11", "--seed=3", "--config.sample.batch_size=8")
    assert command(*flags, "--mode=sample", *other) == 0
    again = contents(folder)
    assert len(again) == 12
    assert all(again[name] == first[name] for name in first if name != "grid.png")
    assert command(*flags, "--mode=sample", "--num=5", "--seed=4") == 0
    assert contents(workdir / "samples" / "seed_4")["00000.png"] != first["00000.png"]


def test_an_interpolation_joins_two_seeds(tiny):
    flags, workdir = tiny
    ends = []
    for seed in (3, 4):
        assert command(*flags, "--mode=sample", "--num=1", f"--seed={seed}") == 0
        ends.append((workdir / "samples" / f"seed_{seed}" / "00000.png").read_bytes())
    assert (
        command(
            *flags,
            "--mode=sample",
            "--num=6",
            "--seed=3",
            "--config.sample.interpolate_to=4",
        )
        == 0
    )
    path = contents(workdir / "samples" / "seed_3_to_4")
    assert len(path) == 8 and "animation.gif" in path
    shown = [pixels(path[f"{index:05d}.png"]) for index in range(6)]
    starts = [pixels(end) for end in ends]
    np.testing.assert_allclose(shown[0], starts[0], atol=1)
    np.testing.assert_allclose(shown[-1], starts[1], atol=1)
    jumps = [np.abs(b - a).mean() for a, b in itertools.pairwise(shown)]
    assert max(jumps) < np.abs(starts[1] - starts[0]).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    "guidance",
    [
        ("--config.teacher.guidance_scale=2.0",),
        (
            "--config.teacher.guidance_range=(1.0, 3.0)",
            "--config.sample.guidance_scale=2.0",
        ),
    ],
    ids=["scale", "range"],
)
def test_a_guided_class_conditional_run(tmp_path, guidance, capsys, monkeypatch):
    workdir = tmp_path / "run"
    flags = (
        write_config(tmp_path, DIGITS),
        f"--workdir={workdir}",
        "--config.data.labels=True",
        "--config.teacher.training.num_steps=10",
        "--config.distill.num_steps=10",
        "--config.run.checkpoint_every=10",
        "--config.evaluation.ddim_steps=(1,)",
        *guidance,
    )
    assert command(*flags) == 0
    results = json.loads((workdir / "results.json").read_text())
    assert set(results["student"]) >= SCORES
    model = json.loads((workdir / "teacher" / "model.json").read_text())
    assert model["num_classes"] == 10
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    importlib.import_module("digit_labels").main([workdir], num_images=40)
    said = re.findall(r"(real|teacher|student) ([0-9.]+)%", capsys.readouterr().out)
    shares = {who: float(share) for who, share in said}
    assert shares.keys() == {"real", "teacher", "student"}
    assert shares["real"] > 97 and max(shares["teacher"], shares["student"]) < 60
    images = {}
    for label in (2, 7):
        flag = f"--config.sample.label={label}"
        assert command(*flags, "--mode=sample", "--num=2", flag) == 0
        (folder,) = (workdir / "samples").glob(f"seed_0_label_{label}*")
        images[label] = contents(folder)
    assert images[2]["00000.png"] != images[7]["00000.png"]
    capsys.readouterr()
    assert command(*flags, "--mode=sample", "--config.sample.label=10") == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert "sample.label is 10" in message and "0 to 9" in message


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path, monkeypatch, who):
    text = MIXTURE if who == "student" else DIGITS
    mode = "--mode=distill" if who == "student" else "--mode=teacher"
    flags = (
        write_config(tmp_path, text),
        mode,
        "--config.run.checkpoint_every=4",
        "--config.run.steps_per_dispatch=2",
        "--config.run.log_every=2",
        "--config.distill.num_steps=12",
        "--config.teacher.training.num_steps=12",
    )
    through, broken = tmp_path / "through", tmp_path / "broken"
    assert command(*flags, f"--workdir={through}") == 0
    write = logs.Logger.write

    def stop(self, step, metrics):
        write(self, step, metrics)
        if step == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(logs.Logger, "write", stop)
        with pytest.raises(Killed):
            command(*flags, f"--workdir={broken}")
    if who == "teacher":
        through, broken = through / "teacher", broken / "teacher"
    assert sorted(os.listdir(broken / "checkpoints")) == ["0", "4"]
    assert steps_of(broken) == [2, 4, 6]
    workdir = broken if who == "student" else broken.parent
    assert command(*flags, f"--workdir={workdir}") == 0
    assert_same_state(saved_state(broken, 12), saved_state(through, 12))
    assert steps_of(broken) == steps_of(through) == [2, 4, 6, 8, 10, 12]
    losses = [
        [row["loss"] for row in logs.read_metrics(folder)]
        for folder in (broken, through)
    ]
    assert losses[0] == losses[1]
    if who == "student":
        # Points in the plane are no images.
        sampling = (flags[0], "--mode=sample", "--num=3", *flags[2:])
        assert command(*sampling, f"--workdir={broken}") == 0
        points = np.load(broken / "samples" / "seed_0" / "samples.npy")
        assert points.shape == (3, 1, 1, 2) and np.isfinite(points).all()
    else:
        weights = [folder / "model.safetensors" for folder in (through, broken)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    workdir = tmp_path / "run"
    code = command(
        write_config(tmp_path, MIXTURE),
        f"--workdir={workdir}",
        "--config.distill.learning_rate=1e38",
        "--config.distill.warmup_steps=0",
    )
    said = capsys.readouterr().err
    assert code == 1 and "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("stopped: step ") and "nan" in last
    assert "learning rate" in last
    # The first state is there from the first moment; no bad one came after it.
    assert os.listdir(workdir / "checkpoints") == ["0"]
    assert not (workdir / "report.html").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    """SIGKILL, in the middle of it, to a process of its own."""
    flags = (
        write_config(tmp_path, MIXTURE),
        "--mode=distill",
        "--config.distill.decay=constant",
        "--config.run.keep_checkpoints=1000",
    )
    broken, through = tmp_path / "broken", tmp_path / "through"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "boot_jax.main", *flags, f"--workdir={broken}"),
            "--config.distill.num_steps=100000",
        ],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (broken / "checkpoints" / "40").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    names = os.listdir(broken / "checkpoints")
    end = max(int(name) for name in names if name.isdigit()) + 40
    assert end < 100_000
    length = f"--config.distill.num_steps={end}"
    for workdir in (broken, through):
        assert command(*flags, length, f"--workdir={workdir}") == 0
    assert steps_of(broken) == steps_of(through) == list(range(10, end + 1, 10))
    assert_same_state(saved_state(broken, end), saved_state(through, end))
