"""Evaluations by the command: figures by choice, references, self-test, networks."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from clip_folders import write_clip_model
from command import DIGITS, MIXTURE, command, write_config
from safetensors.numpy import save_file
from torch_inception import random_inception
from torch_lpips import TorchLpips

from boot_jax import judging
from boot_jax.evaluation.features import get_features
from boot_jax.evaluation.reference import Measured, measure

# A run that learns next to nothing: what is looked at is how it is judged.
TINY = (
    "--config.teacher.training.num_steps=10",
    "--config.distill.num_steps=10",
    "--config.run.checkpoint_every=10",
)
METRICS = ("precision_recall", "density_coverage", "kernel_distance", "diversity")
FEW = (
    "--config.evaluation.num_images=16",
    "--config.evaluation.num_real=48",
    "--config.evaluation.ode_steps=3",
    "--config.evaluation.ddim_steps=(1,)",
)


def distilled(folder, config: str):
    flags = (write_config(folder, config), f"--workdir={folder / 'run'}", *TINY)
    assert command(*flags, "--mode=distill") == 0
    return flags, folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return distilled(tmp_path_factory.mktemp("judged"), MIXTURE)


def evaluate(run, *more: str) -> dict:
    flags, workdir = run
    assert command(*flags, "--mode=evaluate", *more) == 0
    return json.loads((workdir / "results.json").read_text())


def refusal(run, capsys, *more: str) -> str:
    capsys.readouterr()
    assert command(*run[0], "--mode=evaluate", *more) == 2
    (line,) = (
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("error: ")
    )
    return line


def test_all_figures_of_pixels_with_the_self_test(run, capsys):
    flags = (
        f"--config.evaluation.metrics={METRICS}",
        "--config.evaluation.selftest=True",
    )
    results = evaluate(run, *flags)
    figures = {
        *("frechet_distance", "precision", "recall", "density", "coverage"),
        *("kernel_distance", "mean_pairwise_distance"),
    }
    paired = {"normalized_error", "recall_of_teacher"}
    for scores in (results["student"], *results["teacher"]["ddim"].values()):
        assert set(scores["intervals"]) == figures | paired
    floor = results["selftest"]
    assert set(floor["intervals"]) == figures
    assert (floor["num_reference"], floor["num_images"]) == (100, 64)
    assert floor["frechet_distance"] < results["student"]["frechet_distance"]
    assert np.isfinite(floor["frechet_distance_infinite"])
    assert results["distance_name"] == "Fréchet distance"
    assert results["reference"]["count"] == 200
    assert results["data"] == "200 exact samples of the mixture"
    assert results["warnings"] == []

    shown, page = capsys.readouterr().out, (run[1] / "report.html").read_text()
    for text in (shown, page):
        assert "a perfect sampler would get: Fréchet distance" in text
        assert "64 real images" in text and "density" in text and "kernel" in text
    assert "95 % intervals of the student: Fréchet distance" in shown
    low, high = results["student"]["intervals"]["recall"]
    assert f"({low:.3f} to {high:.3f})" in page
    assert "No samples are shown: they are 1x1x2, and no images." in page


def shown(real: Measured | None, nearest_images: int = 2) -> judging.Shown:
    """Two rows of three 4x4 samples, the second a copy of real images."""
    rng = np.random.default_rng(0)
    samples = rng.uniform(-1, 1, (3, 4, 4, 1)).astype(np.float32)
    rows = {"made": samples, "copied": IMAGES[[9, 4, 7]]}
    options = SimpleNamespace(nearest_images=nearest_images)
    run = SimpleNamespace(config=SimpleNamespace(evaluation=options), prompts=None)
    teacher = SimpleNamespace(
        decoder=None, image_shape=(4, 4, 1), sample_shape=(4, 4, 1)
    )
    pair = SimpleNamespace(
        teacher=teacher, condition=lambda indices: {"label": indices + 5}
    )
    features = get_features("pixels", (4, 4, 1))
    given: Any = (run, pair, features, real, rows)
    return judging.show(*given)


IMAGES = np.random.default_rng(1).uniform(-1, 1, (12, 4, 4, 1)).astype(np.float32)


def measured() -> Measured:
    found = measure([IMAGES], get_features("pixels", (4, 4, 1)), "noise")
    return dataclasses.replace(found, images=IMAGES.__getitem__)


def test_samples_are_shown_with_the_real_images_nearest_to_them():
    rows, note = shown(measured())
    assert note == "" and [len(row) for row in rows.values()] == [3, 3]
    nearest = [sample.neighbours[0] for sample in rows["copied"]]
    assert [near.index for near in nearest] == [9, 4, 7]
    assert all(near.distance == 0.0 for near in nearest)
    np.testing.assert_array_equal(nearest[0].image, IMAGES[9])
    assert [sample.caption for sample in rows["made"]] == [
        f"class {label}" for label in (5, 6, 7)
    ]
    assert all(len(s.neighbours) == 2 for row in rows.values() for s in row)


def test_where_there_are_no_neighbours_it_is_said_why():
    stored = dataclasses.replace(measured(), images=None)
    for given, k, words in (
        (None, 2, "the config names no data"),
        (stored, 2, "only statistics are at hand"),
        (measured(), 0, "nearest_images is 0"),
    ):
        rows, note = shown(given, k)
        assert words in note
        assert [len(row) for row in rows.values()] == [3, 3]
        assert not any(s.neighbours for row in rows.values() for s in row)


@pytest.mark.slow
def test_the_reference_is_measured_once_and_can_be_given(run, capsys):
    first = evaluate(run, *FEW)
    (path,) = (
        file
        for file in (run[1] / "statistics").glob("*.npz")
        if "48 exact samples" in str(np.load(file)["provenance"])
    )
    changed = path.stat().st_mtime_ns
    again = evaluate(run, *FEW)
    assert path.stat().st_mtime_ns == changed
    for name in ("frechet_distance", "precision", "recall", "variance_ratio"):
        assert again["student"][name] == pytest.approx(first["student"][name])

    given = evaluate(run, *FEW, f"--config.evaluation.statistics={path}")
    assert given["student"]["frechet_distance"] == pytest.approx(
        first["student"]["frechet_distance"], rel=1e-9
    )
    assert given["reference"] == first["reference"]
    # As other programs write them: the distance is the file's, the rest of the data.
    arrays = np.load(path)
    plain = path.with_name("plain.npz")
    np.savez(plain, mu=arrays["mu"] + 0.5, sigma=arrays["sigma"])
    plainly = evaluate(run, *FEW, f"--config.evaluation.statistics={plain}")
    assert plainly["data"] == "statistics plain.npz"
    assert plainly["student"]["precision"] == first["student"]["precision"]
    distance = plainly["student"]["frechet_distance"]
    assert distance != pytest.approx(first["student"]["frechet_distance"], rel=1e-3)


def test_statistics_of_another_resolution_are_refused(run, capsys, tmp_path):
    path, provenance = tmp_path / "big.npz", {"image_shape": "16x16x1"}
    np.savez(path, mu=np.zeros(64), sigma=np.eye(64), provenance=json.dumps(provenance))
    line = refusal(run, capsys, f"--config.evaluation.statistics={path}")
    assert "images 16x16x1, but the samples' are 1x1x2" in line
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    line = refusal(run, capsys, f"--config.evaluation.statistics={path}")
    assert "2048 features, but those of pixels 1x1x2 are 2" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("features=inception",), "weights is empty; pytorch-fid; not an FID"),
        (
            ("features=inception", "weights=/nowhere/i.safetensors"),
            "there is no file /nowhere/i.safetensors; pytorch-fid",
        ),
        (("metrics=('clip_score',)", "clip=/nowhere"), "takes no prompts"),
        (
            ("metrics=('lpips',)", "lpips_weights=/nowhere/l.safetensors"),
            "there is no file /nowhere/l.safetensors; package lpips",
        ),
        (("metrics=('spatial_frechet_distance',)",), "features='inception'"),
    ],
)
def test_what_is_missing_is_said_in_one_line(run, capsys, flags, words):
    line = refusal(run, capsys, *(f"--config.evaluation.{flag}" for flag in flags))
    for word in words.split("; "):
        assert word in line


@pytest.mark.slow
@pytest.mark.long
def test_fid_and_its_kin_by_a_network_of_random_weights(capsys, tmp_path):
    run = distilled(tmp_path, DIGITS)
    path = tmp_path / "inception.safetensors"
    save_file({k: v.numpy() for k, v in random_inception().state_dict().items()}, path)
    metrics = ("kernel_distance", "inception_score", "spatial_frechet_distance")
    results = evaluate(
        run,
        *FEW,
        "--config.evaluation.features=inception",
        f"--config.evaluation.weights={path}",
        f"--config.evaluation.metrics={metrics}",
        "--config.evaluation.inception_splits=2",
    )
    student = results["student"]
    assert results["distance_name"] == "FID"
    assert "clean resize, uint8" in results["features"]
    assert results["reference"]["features"] == results["features"]
    for name in (*metrics, "frechet_distance"):
        low, high = student["intervals"][name]
        assert low <= student[name] <= high
    assert 1.0 <= student["inception_score"] <= 1008
    assert "split train, the first 48" in results["data"]
    assert len(results["warnings"]) == 2
    page = (run[1] / "report.html").read_text()
    assert f"warning: {results['warnings'][0]}".replace("'", "&#x27;") in page
    shown = capsys.readouterr().out
    for word in ("FID ↓", "KID ↓", "sFID ↓", "score ↑", "at least 2049 images"):
        assert word in shown
    assert f"One step of the student: FID {student['frechet_distance']:.3f}" in shown


SHAPES = DIGITS.replace(
    "    return config\n",
    """
    config.title = "Tiny shapes"
    config.data.name, config.data.captions = "shapes", True
    config.prompts.path = "PROMPTS"
    return config
""",
)


@pytest.mark.slow
def test_lpips_and_clip_score_of_a_teacher_of_prompts(tmp_path, capsys):
    from boot_jax.shapes import captions

    prompts, weights = tmp_path / "prompts.txt", tmp_path / "vgg.safetensors"
    prompts.write_text("\n".join(captions()[:7]) + "\n")
    save_file(TorchLpips("vgg").state_dict(), weights)
    vision = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "projection_dim": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 30,
        "patch_size": 10,
    }
    clip = write_clip_model(tmp_path / "clip", vision)
    config = write_config(tmp_path, SHAPES.replace("PROMPTS", str(prompts)))
    workdir = tmp_path / "run"
    judges = (
        "--config.evaluation.metrics=('lpips','clip_score')",
        f"--config.evaluation.lpips_weights={weights}",
        f"--config.evaluation.clip={clip}",
    )
    assert command(config, f"--workdir={workdir}", *TINY, *FEW, *judges) == 0
    results = json.loads((workdir / "results.json").read_text())
    for scores in (results["student"], *results["teacher"]["ddim"].values()):
        assert scores["lpips"] > 0 and 0 <= scores["clip_score"] <= 100
        for name in ("lpips", "clip_score"):
            low, high = scores["intervals"][name]
            assert low <= scores[name] <= high
    assert results["judges"]["lpips"].startswith("LPIPS vgg (weights ")
    assert results["judges"]["clip_score"].startswith("CLIP clip (2 layers")
    shown = capsys.readouterr().out
    assert "LPIPS ↓" in shown and "score ↑" in shown
