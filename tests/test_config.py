"""What may be set, and what is refused: one line each, saying what would be right."""

import dataclasses
import json

import ml_collections
import pytest

from boot_jax import config as config_lib
from boot_jax.config import ConfigError, default_config, differences
from boot_jax.objectives import Objective
from boot_jax.schedules import get_schedule
from boot_jax.validation import validate


def changed(**fields):
    """The default with fields set by their dotted paths, ``__`` for the dot."""
    config = default_config()
    config.update_from_flattened_dict(
        {path.replace("__", "."): value for path, value in fields.items()}
    )
    return config


def test_the_default_is_valid_and_locked():
    config = default_config()
    validate(config)
    assert config.is_locked
    with pytest.raises(AttributeError, match="batch_size"):
        config.distill.batch_sise = 3
    with pytest.raises(TypeError):
        config.distill.batch_size = "three"
    # Each call makes its own.
    config.distill.batch_size = 3
    assert default_config().distill.batch_size != 3


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"teacher__source": "trane"}, "teacher.source is 'trane'; 'train'"),
        ({"teacher__prediction_type": "eps"}, "teacher.prediction_type; epsilon"),
        ({"teacher__thresholding": "dynamik"}, "teacher.thresholding; 'dynamic'"),
        ({"teacher__training__decay": "linear"}, "teacher.training.decay; cosine"),
        ({"distill__decay": "cos"}, "distill.decay; constant, cosine"),
        ({"network__name": "unett"}, "network.name; did you mean 'unet'"),
        ({"network__dtype": "float16"}, "network.dtype; bfloat16, float32"),
        ({"student__time_conditioning": "add"}, "student.time_conditioning; 'added'"),
        ({"student__output": "noise"}, "student.output; noisy_image, signal"),
        ({"student__output": "noisy_image"}, "alpha is 0; such as t_max=0.98"),
        ({"student__num_half_waves": 0}, "student.num_half_waves is 0; positive"),
        ({"teacher__training__num_steps": 0}, "teacher.training.num_steps; positive"),
        ({"teacher__training__batch_size": -8}, "teacher.training.batch_size is -8"),
        ({"teacher__training__learning_rate": 0.0}, "teacher.training.learning_rate"),
        ({"distill__num_steps": -1}, "distill.num_steps is -1; positive"),
        ({"distill__batch_size": 0}, "distill.batch_size is 0; positive"),
        ({"distill__learning_rate": float("nan")}, "distill.learning_rate is nan"),
        ({"distill__max_grad_norm": 0.0}, "distill.max_grad_norm is 0.0; positive"),
        ({"distill__ema_decay": 1.5}, "distill.ema_decay is 1.5; [0, 1)"),
        ({"distill__b1": 1.0}, "distill.b1 is 1.0; [0, 1)"),
        ({"teacher__training__b2": -0.1}, "teacher.training.b2 is -0.1; [0, 1)"),
        ({"distill__warmup_steps": -5}, "distill.warmup_steps is -5; [0, inf)"),
        ({"distill__weight_decay": -1.0}, "distill.weight_decay is -1.0; [0, inf)"),
        ({"evaluation__num_images": 0}, "evaluation.num_images is 0; positive"),
        ({"evaluation__num_images": 3}, "evaluation.num_images; neighbours = 3"),
        ({"evaluation__num_real": 2}, "evaluation.num_real; neighbours = 3"),
        ({"evaluation__batch_size": 0}, "evaluation.batch_size is 0"),
        ({"evaluation__ode_steps": 0}, "evaluation.ode_steps is 0"),
        ({"evaluation__error_times": 0}, "evaluation.error_times is 0"),
        ({"evaluation__ddim_steps": ()}, "evaluation.ddim_steps; at least one"),
        ({"evaluation__ddim_steps": (1, 0)}, "evaluation.ddim_steps; positive"),
        ({"evaluation__ddim_steps": (2, 2)}, "evaluation.ddim_steps; each once"),
        ({"sample__num": 0}, "sample.num is 0; positive"),
        ({"sample__batch_size": -1}, "sample.batch_size is -1; positive"),
        ({"run__log_every": 0}, "run.log_every is 0; positive"),
        ({"run__checkpoint_every": 0}, "run.checkpoint_every is 0; positive"),
        ({"run__keep_checkpoints": 0}, "run.keep_checkpoints is 0; positive"),
        ({"mesh__fsdp": 0}, "mesh.fsdp is 0; positive"),
        ({"schedule__name": "cosin"}, "schedule.name is 'cosin'; 'cosine'"),
        (
            {"schedule__name": "discrete", "schedule__beta_schedule": "liner"},
            "schedule: ; liner; linear",
        ),
        ({"objective__kind": "bot"}, "objective: kind is 'bot'; 'boot'"),
        ({"objective__solver": "euler"}, "objective: solver is 'euler'; 'heun'"),
        ({"objective__t_min": 0.9, "objective__t_max": 0.8}, "t_min < t_max <= 1"),
        ({"objective__t_min": 0.5, "objective__t_max": 0.5}, "t_min < t_max <= 1"),
        ({"objective__delta": 1.0}, "objective: delta is 1.0; between 0 and"),
        ({"objective__boundary_share": 0.0}, "objective: ; boundary_share is 0.0"),
        ({"objective__adaptive_offset": 0.0}, "adaptive_offset is 0.0; positive"),
        (
            {
                "objective__kind": "direct",
                "student__time_conditioning": "added",
            },
            "time_conditioning is 'added'; 'direct' needs 'noise_level'; 'auto'",
        ),
        (
            {"student__time_conditioning": "noise_level"},
            "time_conditioning is 'noise_level'; 'boot' needs 'added' or 'reused'",
        ),
        (
            {
                "objective__kind": "progressive",
                "teacher__source": "diffusers",
                "teacher__path": "some/folder",
                "data__name": "",
            },
            "'progressive' needs real images: set data.name; pid and direct do not",
        ),
        (
            {"objective__kind": "progressive", "distill__num_steps": 3},
            "distill.num_steps is 3; at least 4, the stages; teacher_steps = 16",
        ),
        ({"teacher__guidance_scale": 2.0}, "class-conditional; data.labels=True"),
        (
            {"teacher__guidance_range": (3.0, 1.0), "data__labels": True},
            "teacher.guidance_range; (w_min, w_max)",
        ),
        (
            {"teacher__guidance_range": (2.0, 4.0), "data__labels": True},
            "sample.guidance_scale is 1.0; teacher.guidance_range = (2.0, 4.0)",
        ),
        ({"teacher__prediction_type": "epsilon"}, "epsilon; objective.t_max; 0.99"),
        ({"teacher__source": "mixture"}, "teacher.mixture has 0 means; at least one"),
        ({"data__name": ""}, "data.name is empty; digits, folder or tfds:NAME"),
        ({"teacher__source": "checkpoint"}, "teacher.path is empty; model.json"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_field_is_refused_in_one_line(fields, words):
    with pytest.raises(ConfigError) as refusal:
        validate(changed(**fields))
    message = str(refusal.value)
    assert "\n" not in message
    for word in words.split("; "):
        assert word in message


@pytest.mark.parametrize(
    "fields",
    [
        {"data__labels": True, "teacher__guidance_scale": 2.0},
        {
            "data__labels": True,
            "teacher__guidance_range": (1.0, 4.0),
            "sample__guidance_scale": 4.0,
        },
        {"teacher__prediction_type": "epsilon", "objective__t_max": 0.99},
        {"teacher__prediction_type": "epsilon", "schedule__name": "linear_beta"},
        {
            "teacher__source": "mixture",
            "data__name": "",
            "teacher__mixture__means": ((0.0, 1.0),),
            "teacher__mixture__scales": (1.0,),
        },
        {"teacher__source": "checkpoint", "teacher__path": "elsewhere"},
    ],
)
def test_what_makes_sense_is_accepted(fields):
    validate(changed(**fields))


@pytest.mark.parametrize(
    "name, options",
    [
        ("cosine", {"shift": 2.0}),
        ("flow", {"shift": 3.0}),
        ("linear_beta", {"beta_min": 0.2, "beta_max": 10.0}),
        ("edm", {"sigma_min": 0.01, "sigma_max": 50.0, "rho": 5.0}),
        (
            "discrete",
            {
                "num_train_timesteps": 100,
                "beta_schedule": "scaled_linear",
                "beta_start": 1e-3,
                "beta_end": 0.03,
                "rescale_betas_zero_snr": True,
            },
        ),
    ],
)
def test_the_schedule_is_the_one_described(name, options):
    fields = {f"schedule__{key}": value for key, value in options.items()}
    section = changed(schedule__name=name, **fields).schedule
    assert config_lib.schedule_from(section) == get_schedule(name, **options)
    assert config_lib.schedule_options(section) == options


def test_the_objective_is_the_one_described():
    options = {
        "kind": "continuous",
        "t_min": 0.02,
        "t_max": 0.9,
        "delta": 0.1,
        "solver": "ddim",
        "weighting": "dt",
        "boundary_weight": 0.5,
        "boundary_share": 0.25,
        "target_network": "ema",
        "time_order": "progressive",
        "derivative": "finite_difference",
        "adaptive_power": 0.7,
        "adaptive_offset": 0.3,
    }
    config = changed(**{f"objective__{key}": value for key, value in options.items()})
    assert config_lib.objective_from(config.objective) == Objective(**options)
    # The section has every field but the function, with the objective's defaults.
    section = default_config().objective.to_dict()
    defaults = dataclasses.asdict(Objective())
    del defaults["distance"]
    assert section == defaults


def test_json_gives_the_config_back():
    config = changed(
        teacher__mixture__means=((0.5, 1.0), (0.0, -1.0)), distill__b1=0.25
    )
    text = config_lib.to_json(config)
    assert differences(json.loads(text), config.to_dict()) == []
    assert json.loads(text)["distill"]["b1"] == 0.25
    rebuilt = ml_collections.ConfigDict(json.loads(text))
    assert config_lib.to_json(rebuilt) == text


def test_differences_are_named_with_both_values():
    old = default_config().to_dict()
    new = changed(distill__batch_size=64, schedule__name="flow", seed=3).to_dict()
    assert differences(old, new) == [
        "distill.batch_size: 128 -> 64",
        "schedule.name: 'cosine' -> 'flow'",
        "seed: 0 -> 3",
    ]


def test_a_run_may_be_looked_at_and_moved_otherwise():
    new = changed(
        title="another",
        evaluation__num_images=10,
        sample__seed=7,
        run__log_every=1,
        mesh__fsdp=2,
        distill__num_steps=9,
        teacher__training__num_steps=8,
    )
    assert differences(default_config().to_dict(), new.to_dict()) == []


def test_a_field_that_a_workdir_lacks_has_its_default_there():
    """So that a run of an earlier version goes on."""
    old, new = default_config().to_dict(), default_config().to_dict()
    del old["objective"]["correction"]
    assert differences(old, new) == []
    new["objective"]["correction"]["strength"] = 1.0
    assert differences(old, new) == ["objective.correction.strength: 0.0 -> 1.0"]


def test_a_field_that_the_config_lacks_is_a_difference():
    old, new = default_config().to_dict(), default_config().to_dict()
    del new["objective"]["adaptive_power"]
    assert differences(old, new) == ["objective.adaptive_power: 0.0 -> None"]
    old["objective"]["other"] = 3
    assert "objective.other: 3 -> None" in differences(old, new)
