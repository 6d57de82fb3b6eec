"""The rivals as whole runs: on the exact mixture, on digits, and interrupted."""

import itertools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import DIGITS, MIXTURE, command, write_config
from test_end_to_end import Killed, assert_same_state, saved_state
from test_text_run import SHAPES

from boot_jax import stored
from boot_jax.config import default_config
from boot_jax.interruption import Interruption
from boot_jax.run import Run
from boot_jax.sampling import image_noise, many_steps, stored_noise
from boot_jax.sharding import create_mesh
from boot_jax.solvers import add_noise, ddim_step, time_grid
from boot_jax.trained import trained_pair
from boot_jax.training import logs

KINDS = ("pid", "direct", "progressive", "consistency")

# A network that can follow the mixture's map, and steps enough to learn it.
LONGER = MIXTURE.replace(
    "    return config\n",
    """
    config.network.dit["hidden_size"] = 64
    config.network.dit["num_layers"] = 2
    config.objective.solver = "ddim"
    config.objective.teacher_steps = 4
    config.objective.adaptive_power = 0.0
    config.distill.update(num_steps=1600, batch_size=256, learning_rate=4e-3)
    config.run.update(log_every=200, checkpoint_every=400, steps_per_dispatch=50)
    return config
""",
)


def run_of(workdir: pathlib.Path) -> Run:
    config = default_config()
    config.update(json.loads((workdir / "config.json").read_text()))
    return Run(config, workdir, create_mesh(), Interruption())


def error(made, target, exact) -> float:
    """Over the variance of the exact samples."""
    difference = np.asarray(made) - np.asarray(target)
    return float((difference**2).sum() / (exact - exact.mean(0)).var() / exact.size)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_student_is_what_its_theory_says(tmp_path, kind):
    """``pid`` follows the ODE itself, the others their teacher's four steps."""
    workdir = tmp_path / "run"
    flags = write_config(tmp_path, LONGER), f"--workdir={workdir}", "--mode=distill"
    assert command(*flags, f"--config.objective.kind={kind}") == 0
    run = run_of(workdir)
    pair = trained_pair(run)
    eps = image_noise(7, np.arange(2000), (1, 1, 2))
    made = pair.student()(eps, None)
    exact = np.asarray(pair.ode(100)(eps, None))
    four = pair.sampler(4)(eps, None)
    if kind == "consistency":
        # Its grid ends at t_min; where that is left, the signal is the sample.
        four = eps
        times = time_grid(4, 1.0, run.objective.t_min)
        for t, s in itertools.pairwise(times):
            ends = (jnp.full(len(eps), end) for end in (t, s))
            four = ddim_step(
                lambda x, t: run.denoise(run.teacher.params, x, t, None),
                run.schedule,
                four,
                *ends,
            )
        end = jnp.full(len(eps), run.objective.t_min)
        four = (
            four - add_noise(run.schedule, 0 * four, eps, end)
        ) / run.schedule.alpha(end)[:, None, None, None]
    to_exact, to_four = error(made, exact, exact), error(made, four, exact)
    if kind == "pid":
        assert to_exact < 0.01 < to_four
    else:
        assert to_four < 0.006 < to_exact


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A teacher of tiny digits with labels; flags of a run that learns from it."""
    folder = tmp_path_factory.mktemp("digits")
    config = write_config(folder, DIGITS)
    train = (config, f"--workdir={folder / 'taught'}", "--config.data.labels=True")
    assert command(*train, "--mode=teacher") == 0
    return (
        config,
        "--config.data.labels=True",
        "--config.teacher.source=checkpoint",
        f"--config.teacher.path={folder / 'taught' / 'teacher'}",
        "--config.teacher.guidance_scale=1.5",
        "--config.objective.teacher_steps=4",
        "--config.evaluation.bootstrap=0",
        "--config.evaluation.ddim_steps=(1,)",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, options",
    [
        *((kind, ()) for kind in KINDS),
        ("direct", ("--config.objective.stored_samples=50",)),
    ],
)
def test_a_whole_run_on_digits(tmp_path, digits, kind, options):
    workdir = tmp_path / "run"
    flags = (*digits, f"--workdir={workdir}", f"--config.objective.kind={kind}")
    flags += options
    assert command(*flags) == 0
    results = json.loads((workdir / "results.json").read_text())
    assert np.isfinite(results["student"]["frechet_distance"])
    # A curve over target times is of those who know them.
    assert ("error_over_time" in results) == (kind == "pid")
    page = (workdir / "report.html").read_text()
    assert ("over target time" in page) == (kind == "pid")
    rows = logs.read_metrics(workdir)
    assert all(np.isfinite(row["loss"]) for row in rows)
    seconds = sum(row["seconds"] for row in rows)
    if kind == "progressive" or options:
        assert results["seconds"]["distill"] > seconds
    stages = sorted(path.name for path in workdir.glob("stages/*"))
    assert stages == (["01"] if kind == "progressive" else [])
    assert rows[-1]["step"] == (20 if kind == "progressive" else 40)
    assert command(*flags, "--mode=sample", "--num=3") == 0
    assert (workdir / "samples" / "seed_0" / "00002.png").exists()
    assert command(*flags, "--mode=export") == 0
    card = (workdir / "export" / "README.md").read_text()
    has_data = kind in ("progressive", "consistency")
    assert ("with training data" in card) == has_data
    assert ("without training data" in card) == (not has_data)
    # The exported file gives what the student gives.
    exported = jax.export.deserialize(
        bytearray((workdir / "export" / "jax" / "student.jax_export").read_bytes())
    )
    eps = image_noise(3, np.arange(4), (8, 8, 1))
    labels = np.arange(4, dtype=np.int32)
    made = exported.call(eps, labels)
    ours = trained_pair(run_of(workdir)).student()(eps, {"label": labels})
    np.testing.assert_allclose(made, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_prompts_and_captions(tmp_path):
    """Stored samples of prompts, and images with captions."""
    (tmp_path / "prompts.txt").write_text("a red square\na green triangle\n")
    taught = tmp_path / "taught"
    config = (
        write_config(tmp_path, SHAPES),
        f"--config.prompts.path={tmp_path / 'prompts.txt'}",
    )
    assert command(*config, f"--workdir={taught}", "--mode=teacher") == 0
    learn = (
        *config,
        "--mode=distill",
        "--config.teacher.source=checkpoint",
        f"--config.teacher.path={taught / 'teacher'}",
        "--config.objective.teacher_steps=2",
        "--config.distill.num_steps=10",
    )
    for kind in ("direct", "progressive", "consistency"):
        workdir = tmp_path / kind
        flags = (*learn, f"--workdir={workdir}", f"--config.objective.kind={kind}")
        if kind == "direct":
            flags += ("--config.objective.stored_samples=24",)
        assert command(*flags) == 0
        rows = logs.read_metrics(workdir)
        assert rows[-1]["step"] == 10 and np.isfinite(rows[-1]["loss"])
    folder = tmp_path / "direct" / "stored_samples"
    assert {path.stem for path in folder.glob("*.npy")} == {"target", "prompt"}
    prompt = np.load(folder / "prompt.npy")
    assert prompt.shape == (24,) and set(prompt) == {0, 1}
    # A prompt's samples are of the prompt: the guided teacher's, one by one.
    run = run_of(tmp_path / "direct")
    pair = trained_pair(run)
    eps = stored_noise(0, np.arange(24), run.teacher.sample_shape)
    sampler = many_steps(
        run.denoise, run.teacher.params, run.teacher.schedule, 2, solver="heun"
    )
    tokens = run.prompts.cache.take(prompt)["tokens"]
    made = sampler(eps, pair.encode({"tokens": tokens}))
    kept = np.load(folder / "target.npy")
    np.testing.assert_allclose(kept, made, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind", [pytest.param("progressive", marks=pytest.mark.slow), "stored"]
)
def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path, monkeypatch, kind):
    options = {
        "progressive": ("--config.objective.kind=progressive",),
        "stored": (
            "--config.objective.kind=direct",
            "--config.objective.stored_samples=40",
        ),
    }[kind]
    flags = (
        write_config(tmp_path, MIXTURE),
        "--mode=distill",
        "--config.objective.teacher_steps=8",
        "--config.distill.num_steps=12",
        "--config.run.checkpoint_every=2",
        "--config.run.steps_per_dispatch=2",
        "--config.run.log_every=2",
        "--config.run.keep_checkpoints=9",
        *options,
    )
    through, broken = tmp_path / "through", tmp_path / "broken"
    assert command(*flags, f"--workdir={through}") == 0
    write, made = logs.Logger.write, stored._write
    at = []

    def stop(self, step, metrics):
        write(self, step, metrics)
        at.append(step)
        # In the second stage; in the middle of the only one.
        if len(at) == 4:
            raise Killed

    def stop_making(folder, rows, start, num, meta):
        made(folder, rows, start, num, meta)
        if start == 16:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stored, "_write", stop_making)
        if kind == "stored":
            with pytest.raises(Killed):
                command(*flags, f"--workdir={broken}")
    with monkeypatch.context() as patch:
        patch.setattr(logs.Logger, "write", stop)
        with pytest.raises(Killed):
            command(*flags, f"--workdir={broken}")
    if kind == "progressive":
        assert sorted(os.listdir(broken / "stages")) == ["01", "02"]
        assert not (broken / "checkpoints").exists()
        first = saved_state(broken / "stages" / "01", 4)
    assert command(*flags, f"--workdir={broken}") == 0
    end = 4 if kind == "progressive" else 12
    assert_same_state(saved_state(broken, end), saved_state(through, end))
    if kind == "progressive":
        assert_same_state(saved_state(broken / "stages" / "01", 4), first)
        assert_same_state(
            saved_state(broken / "stages" / "02", 4),
            saved_state(through / "stages" / "02", 4),
        )
        check_stages_follow(through / "stages" / "01", through / "stages" / "02")
        check_stages_follow(through / "stages" / "02", through)


def check_stages_follow(before: pathlib.Path, after: pathlib.Path) -> None:
    """Each begins at the moving average of the one before."""
    taught, start = saved_state(before, 4), saved_state(after, 0)
    averages = {name: leaf for name, leaf in taught.items() if "'ema_params'" in name}
    assert averages
    for name, leaf in averages.items():
        for part in ("'ema_params'", "'params'"):
            own = start[name.replace("'ema_params'", part)]
            np.testing.assert_array_equal(own, leaf)


@pytest.mark.parametrize(
    "options, words",
    [
        (
            ("--config.teacher.source=checkpoint", "--config.teacher.path=nowhere"),
            "'consistency' needs real images: set data.name",
        ),
        (("--config.student.time_conditioning=added",), "needs 'noise_level'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, capsys, options, words):
    flags = write_config(tmp_path, MIXTURE), f"--workdir={tmp_path / 'run'}"
    kind = "--config.objective.kind=consistency"
    capsys.readouterr()
    assert command(*flags, kind, *options) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and words in said
