"""Every config loads; the big ones have their size, and run when made small."""

import importlib.util
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from PIL import Image

from boot_jax import config as config_lib
from boot_jax import pipeline, validation
from boot_jax.run import Run
from boot_jax.sharding import AXES
from boot_jax.student import create_student
from boot_jax.teachers.checkpoint import describe, from_description
from boot_jax.training.logs import read_metrics
from boot_jax.workdir import open_workdir

ROOT = pathlib.Path(__file__).parents[1]
PATHS = sorted((ROOT / "configs").glob("*.py"))

#: The big ones: image size, number of classes, and millions of parameters. Those of
#: CIFAR-10 and LSUN are of DDPM (35.7 and 114), that of ImageNet of ADM (296).
BIG = {
    "cifar10": (32, None, 35.7),
    "ffhq64": (64, None, 58.7),
    "imagenet64": (64, 1000, 295.9),
    "lsun_bedroom256": (256, None, 113.7),
}


def module_of(path: pathlib.Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(name: str) -> Any:
    return module_of(ROOT / "configs" / f"{name}.py").get_config()


def parameters(tree: Any) -> float:
    """In millions."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_config_is_valid_locked_and_says_its_command(path):
    module = module_of(path)
    config = module.get_config()
    validation.validate(config)
    assert config.is_locked
    with pytest.raises(AttributeError):
        config.distill.nun_steps = 1
    with pytest.raises(AttributeError):
        config.objectiv = {}
    first, blank, command, *_ = module.__doc__.splitlines()
    assert first.endswith(".") and not blank
    assert command.startswith(f"python -m boot_jax.main --config=configs/{path.name}")
    # What a command needs besides is in it.
    needs_path = config.data.name == "folder" and not config.data.path
    assert needs_path == ("--config.data.path=" in command)


def test_all_configs_are_here():
    assert {path.stem for path in PATHS} >= {"digits", "toy_mixture", *BIG}


@pytest.mark.parametrize("name", BIG)
def test_a_big_config_has_its_full_size(name):
    config, (size, num_classes, millions) = load(name), BIG[name]
    assert config.data.image_size == size
    assert config.data.labels == (num_classes is not None)
    teacher = from_description(
        describe(
            network=config.network.name,
            network_options=config.network[config.network.name].to_dict(),
            schedule=config.schedule.name,
            schedule_options=config_lib.schedule_options(config.schedule),
            prediction_type=config.teacher.prediction_type,
            sample_shape=(size, size, config.data.channels),
            num_classes=num_classes,
        ),
        dtype=config.network.dtype,
        remat=config.network.remat,
    )
    assert parameters(teacher.params) == pytest.approx(millions, abs=0.1)

    network = create_student(teacher, t_max=config.objective.t_max).network
    image, one = jnp.zeros((1, *teacher.sample_shape)), jnp.zeros((1,))
    label = None if num_classes is None else {"label": jnp.zeros((1,), jnp.int32)}
    shapes = jax.eval_shape(
        lambda key: network.init(key, image, one, label, {"target_time": one}),
        jax.random.key(0),
    )
    # The target time costs next to nothing.
    assert 0 < parameters(shapes) - parameters(teacher.params) < 0.01 * millions
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"float32"}


def small(name: str, folder: pathlib.Path) -> Any:
    """The config with one narrow block of each kind it has, and images for that."""
    config = load(name)
    unet = config.network.unet.to_dict()
    for types in ("down_block_types", "up_block_types"):
        unet[types] = tuple(dict.fromkeys(unet[types]))
    unet |= {"block_out_channels": (8, 16), "layers_per_block": 1}
    heads = 4 if unet["attention_head_dim"] else None
    config.network.unet = unet | {"norm_num_groups": 4, "attention_head_dim": heads}
    rng = np.random.default_rng(0)
    for index in range(4):
        pixels = rng.integers(0, 256, (4, 4, 3), np.uint8)
        target = folder / "images" / f"class_{index % 2}" / f"{index}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target)
    config.data.name, config.data.path = "folder", str(folder / "images")
    config.data.image_size = 4
    for training in (config.teacher.training, config.distill):
        training.num_steps, training.batch_size = 1, 4
    return config


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    """What is compiled here runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def run_on_one_device(config: Any, workdir: pathlib.Path) -> Run:
    validation.validate(config)
    one = {"devices": jax.devices()[:1], "axis_types": (AxisType.Auto,) * 3}
    return Run(
        config, open_workdir(workdir, config), jax.make_mesh((1, 1, 1), AXES, **one)
    )


#: The compilation takes its time; CI runs one config, the most complicated.
STEPS = [
    pytest.param(name, marks=() if name == "imagenet64" else pytest.mark.long)
    for name in BIG
]


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.usefixtures("quick_compilation")
def test_a_big_config_takes_a_step_of_either_training(name, tmp_path):
    workdir = tmp_path / "run"
    pipeline.distill(run_on_one_device(small(name, tmp_path), workdir))
    for folder, wanted in (
        (workdir / "teacher", {"loss/denoising"}),
        (workdir, {"loss/trajectory", "loss/boundary"}),
    ):
        (row,) = read_metrics(folder)
        assert row["step"] == 1
        assert wanted <= row.keys()
        assert np.isfinite(row["loss"]) and row["loss"] > 0
    described = json.loads((workdir / "teacher" / "model.json").read_text())
    assert described["num_classes"] == (None if BIG[name][1] is None else 2)


@pytest.mark.slow
@pytest.mark.long
def test_the_toy_beats_eight_steps_of_its_teacher(tmp_path):
    config = load("toy_mixture")
    config.distill.num_steps = 1000  # a third
    config.distill.warmup_steps = 50
    config.evaluation.num_images = config.evaluation.num_real = 1024
    config.evaluation.ddim_steps = (4, 8, 16)
    run = run_on_one_device(config, tmp_path / "run")
    pipeline.distill(run)
    pipeline.evaluate(run)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    eight = results["teacher"]["ddim"]["8"]["normalized_error"]
    assert results["student"]["normalized_error"] < 0.5 * eight
    assert "where each noise goes" in (tmp_path / "run" / "report.html").read_text()
