"""What may be set: the schema with its defaults, and what is made of it.

A config file calls `default_config`, changes fields and returns it. The result is a
locked `ml_collections.ConfigDict`: a misspelt field is an error.
`boot_jax.validation` checks the values.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from boot_jax.objectives import Correction, Objective
from boot_jax.schedules import NoiseSchedule, get_schedule

TEACHER_SOURCES = ("train", "checkpoint", "mixture", "diffusers", "flax_pipeline")
NETWORKS = ("dit", "unet")

#: Sections that do not change what a run computes, so a workdir may go on with others.
FREE_SECTIONS = ("evaluation", "sample", "run", "mesh", "compare")

_SCHEDULE_FIELDS = {
    "cosine": ("shift",),
    "flow": ("shift",),
    "linear_beta": ("beta_min", "beta_max"),
    "edm": ("sigma_min", "sigma_max", "rho"),
    "discrete": (
        "num_train_timesteps",
        "beta_schedule",
        "beta_start",
        "beta_end",
        "rescale_betas_zero_snr",
    ),
}


class ConfigError(ValueError):
    """A config that cannot be run; the message is one line for the user."""


def _training(num_steps: int, batch_size: int) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "num_steps": num_steps,
            "batch_size": batch_size,  # images in the global batch
            "learning_rate": 1e-3,
            "warmup_steps": 100,
            "decay": "cosine",  # constant | cosine (to zero)
            "b1": 0.9,
            "b2": 0.99,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "ema_decay": 0.999,
            "microbatches": 1,  # parts of the batch, one after the other in less memory
            "skip_nonfinite": 0,  # steps that may be left out as not finite, at most
        }
    )


def _correction() -> ml_collections.ConfigDict:
    """Of the distribution of samples; see `boot_jax.objectives.correction`."""
    return ml_collections.ConfigDict(
        {
            "strength": 0.0,  # relative to the loss of trajectories; 0: none
            "share": 0.25,  # of the batch, taken from the trajectories; at most 0.5
            "trajectory_weight": 1.0,  # 0: the correction alone
            "time_range": (0.05, 0.95),  # to which samples are noised again
            "time_distribution": "uniform",  # uniform | logit_normal
            "time_mean": 0.5,  # of logit_normal; above 0 leans to noise
            "time_scale": 1.0,
            "guidance_interval": (),  # of t, for the correction; (): the teacher's own
            # Of the auxiliary network, for each update of the student:
            "updates": 1,
            "auxiliary_share": 0.25,  # of the batch
            "learning_rate": 5e-4,
            "decay": "cosine",  # constant | cosine
            "b1": 0.0,
            "b2": 0.99,
            "lora_rank": 0,  # of adapters instead of a whole network; 0: the latter
        }
    )


def default_config() -> Any:
    """Every field with its default; a comment says what each one means."""
    config = ml_collections.ConfigDict()
    config.title = "boot_jax"
    config.seed = 0
    config.data = ml_collections.ConfigDict(
        {
            "name": "digits",  # digits | shapes | folder | tfds:NAME | "" for none
            "path": "",  # of the folder, or tfds' data_dir
            "split": "train",
            "image_size": 0,  # 0: as they are
            "channels": 0,  # 0: as they are
            "random_flip": False,
            "labels": False,  # whether the teacher is class-conditional
            "captions": False,  # whether it is text-conditional
        }
    )
    # Read where the teacher takes prompts.
    config.prompts = ml_collections.ConfigDict(
        {
            "path": "",  # file or pattern: .txt .jsonl .csv .tsv .parquet
            "column": "prompt",  # of all but text files
            "negative": "",  # of the unconditional half of guidance, if no column is
            "negative_column": "",
            "cache_dir": "",  # of tokens; "": prompts/ in the workdir
            # none: the text encoder runs within the step; else its embeddings are kept
            # on disk in this type: bfloat16 | float16 | float32
            "embeddings": "none",
        }
    )
    # Not read with a teacher of diffusers, nor are prediction_type, thresholding.
    config.schedule = ml_collections.ConfigDict(
        {
            "name": "cosine",  # cosine | linear_beta | edm | flow | discrete
            "shift": 1.0,  # cosine, flow
            "beta_min": 0.1,  # linear_beta
            "beta_max": 20.0,
            "sigma_min": 0.002,  # edm
            "sigma_max": 80.0,
            "rho": 7.0,
            "num_train_timesteps": 1000,  # discrete, with diffusers' names
            "beta_schedule": "linear",
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "rescale_betas_zero_snr": False,
        }
    )
    config.network = ml_collections.ConfigDict(
        {
            "name": "dit",  # dit | unet
            "dtype": "float32",  # of the computation: float32 | bfloat16
            # What a block keeps for the backward pass: none recomputes nothing; else a
            # policy of jax.checkpoint_policies (nothing_saveable: the least memory).
            "remat": "none",
            "attention": "auto",  # auto | xla | cudnn (16-bit; has no jvp)
            "dit": {
                "patch_size": 2,
                "hidden_size": 128,
                "num_layers": 4,
                "num_heads": 4,
                "mlp_ratio": 4.0,
            },
            "unet": {  # a diffusers UNet2DModel config; its names and defaults
                "block_out_channels": (32, 64),
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "layers_per_block": 2,
                "attention_head_dim": 8,
                "norm_num_groups": 32,
                "resnet_time_scale_shift": "default",
                "add_attention": True,
                "dropout": 0.0,
            },
        }
    )
    config.teacher = ml_collections.ConfigDict(
        {
            # train | checkpoint | mixture | diffusers | flax_pipeline
            "source": "train",
            "path": "",  # checkpoint: a folder with model.json; others: or a hub id
            "revision": "",  # of a hub id; its token is the environment's, HF_TOKEN
            "null_label": False,  # diffusers: a UNet's last class means none
            "prediction_type": "v_prediction",
            "param_dtype": "float32",  # in which it is kept: float32 | bfloat16
            "thresholding": "none",  # none | clip | dynamic
            "guidance_scale": 1.0,  # w; 1 is no guidance
            "guidance_range": (),  # (w_min, w_max): drawn, and told to the student
            "guidance_interval": (0.0, 1.0),  # of t; outside of it w is 1
            "guidance_rescale": 0.0,  # phi, 0 to 1
            "label_dropout": 0.1,  # of captions too
            "mixture": {  # components of the exact teacher, in H x W x C
                "sample_shape": (1, 1, 2),
                "means": (),  # a row of H * W * C numbers a component
                "scales": (),
            },
            "training": _training(num_steps=4000, batch_size=128),
        }
    )
    config.student = ml_collections.ConfigDict(
        {
            # auto (added, or where the kind has no target time noise_level) |
            # added | reused (the teacher's time input) | noise_level
            "time_conditioning": "auto",
            "num_half_waves": 2,  # of the target-time embedding
            "output": "signal",  # signal | noisy_image (to show why not)
        }
    )
    config.objective = ml_collections.ConfigDict(
        {
            # boot | continuous | pid | direct | progressive | consistency; the last
            # two learn from real images
            "kind": "boot",
            "t_min": 0.01,
            "t_max": 1.0,
            "delta": 0.04,
            "solver": "heun",  # ddim | heun: the teacher's step in the target
            "weighting": "x0",  # x0 | dt | uniform | noisy_image
            "boundary_weight": 1.0,
            "boundary_share": 1.0,  # of the batch
            "target_network": "online",  # online | ema
            "time_order": "uniform",  # uniform | progressive
            "derivative": "jvp",  # jvp | finite_difference, for continuous and pid
            "adaptive_power": 0.0,  # 1 bounds every image's pull on the student
            "adaptive_offset": 0.01,
            # direct: of the samples; progressive: of its first teacher, a power of two;
            # consistency: between the points
            "teacher_steps": 16,
            "grid_power": 1.0,  # of their times; above 1 crowds them at the end
            "stored_samples": 0,  # direct: made once, before; 0: new ones in each step
            # (u_min, u_max): part of the batch starts there, on the student's own
            # trajectories, so that it can be used in a few steps; (): none
            "start_times": (),
            "start_share": 0.25,  # of the batch, that part
            "correction": _correction(),
        }
    )
    config.distill = _training(num_steps=4000, batch_size=128)
    config.evaluation = ml_collections.ConfigDict(
        {
            "num_images": 2048,
            "num_real": 10_000,  # at most, of the data's first
            "batch_size": 512,
            "features": "pixels",  # pixels | inception (FID, with its weights)
            "weights": "",  # of inception: .safetensors, .npz or .msgpack
            "resize": "clean",  # clean | legacy_pytorch | legacy_tensorflow
            "round_uint8": True,  # images, before they are resized
            "statistics": "",  # .npz to be compared with; "": those of the data
            # Beside the Frechet distance: precision_recall, density_coverage,
            # kernel_distance, diversity; of inception also inception_score and
            # spatial_frechet_distance; with weights of their own lpips and clip_score.
            "metrics": ("precision_recall",),
            "inception_splits": 10,  # parts of the images; 1: not by their order
            "kernel_subset_size": 0,  # 0: all pairs of images; 1000 as published
            "lpips_weights": "",  # .safetensors, .npz or .msgpack
            "clip": "",  # a folder of a CLIP model
            "bootstrap": 100,  # resamples of the 95 % intervals; 0: no intervals
            "selftest": False,  # whether real images are also scored against others
            "ddim_steps": (1, 2, 4, 8, 10, 16, 32, 50),
            "student_steps": (1, 2, 4),  # more than 1: with objective.start_times
            "student_renoise": "along",  # as sample.renoise
            "ode_steps": 80,  # of Heun, two teacher calls each
            "error_times": 16,  # points on the curve of error over target time
            "error_images": 256,
            "grid_images": 12,
            "neighbours": 3,  # k of precision and recall
            "nearest_images": 5,  # real ones beside each of the grid's; 0: none
            "seed": 1_000_003,
        }
    )
    config.sample = ml_collections.ConfigDict(
        {
            "num": 64,
            "seed": 0,
            "batch_size": 64,
            "label": -1,  # -1: every class in turn
            "prompt": "",  # "": those of sample.prompts in turn
            "prompts": "",  # a file; "": those of prompts.path
            "negative_prompt": "",  # of the teacher's samples; "": prompts.negative
            "prompt_to": "",  # a second prompt, to which embeddings go in a line
            "same_noise": False,  # all images from one noise
            "teacher_steps": (),  # also the teacher's, in so many steps each, beside
            "guidance_scale": 1.0,  # told to a student that was trained on a range
            "steps": 1,  # of the student; more need objective.start_times
            "renoise": "along",  # its ODE to the next step; or add fresh noise
            "interpolate_to": -1,  # a second seed: slerp from the first; -1 is off
        }
    )
    config.compare = ml_collections.ConfigDict(  # of --mode=compare
        {
            # Names of variants, or of objective.kind; (): all variants.
            "kinds": (),
            # A name to settings of its own, ("objective.weighting=uniform", ...).
            "variants": ml_collections.ConfigDict(),
            # calls, steps: amounts are times those of the config's own run; seconds
            "budget": "calls",
            "amounts": (1.0,),
            "seeds": (0, 1, 2),
        }
    )
    config.mesh = ml_collections.ConfigDict(
        {
            "data": -1,  # devices on the data axis; -1: all that are left
            "fsdp": 1,  # devices that share the parameters
            "tensor": 1,  # devices that share what a rule AXIS:DIMENSION splits
            "fsdp_min_size": 2**20,  # smaller arrays are replicated
            # (regex, tactic) by the parameter's path; see boot_jax.sharding.
            "rules": ((".*", "fsdp"),),
            "teacher_rules": ((".*", "fsdp"),),
        }
    )
    config.run = ml_collections.ConfigDict(
        {
            "steps_per_dispatch": 0,  # 0: chosen by backend and network
            "log_every": 100,
            "sample_every": 0,  # steps between grids beside the teacher's; 0: none
            "sample_images": 8,  # in each
            "checkpoint_every": 1000,
            "keep_checkpoints": 2,  # the newest so many
            "keep_every": 0,  # steps divisible by it are kept for good; 0 for none
            "watchdog_seconds": 1800,  # for a step, before it counts as hung; 0: no end
            "heartbeat_seconds": 100,  # of silence, before a process counts as dead
            # Where there is a correction: steps between checks of the student's recall
            # of its teacher's samples, 0 for none; how many; a fall that is warned of.
            "recall_every": 1000,
            "recall_images": 256,
            "recall_drop": 0.1,
            "spike_factor": 5.0,  # a loss so many times the median is recorded; 0: none
            "tensorboard": True,
            "wandb_project": "",  # needs the extra [wandb]
            "force": False,  # go on though the workdir's teacher or config differs
        }
    )
    config.lock()
    variants: Any = config.compare.variants
    variants.unlock()  # their names are free
    return config


def schedule_from(config: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule of a config's ``schedule`` section.

    Raises:
      ConfigError: its name is not known.
    """
    name = config["name"]
    if name not in _SCHEDULE_FIELDS:
        raise ConfigError(unknown("schedule.name", name, _SCHEDULE_FIELDS))
    try:
        return get_schedule(name, **schedule_options(config))
    except ValueError as error:
        raise ConfigError(f"schedule: {error}") from error


def schedule_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config's ``schedule`` section that its schedule has."""
    return {key: config[key] for key in _SCHEDULE_FIELDS[config["name"]]}


def objective_from(config: Mapping[str, Any]) -> Objective:
    """The objective of a config's ``objective`` section.

    Raises:
      ConfigError: a choice is not known, or the times make no sense.
    """
    try:
        fields = dict(config)
        correction = Correction(**fields.pop("correction"))
        return Objective(correction=correction, **fields)
    except ValueError as error:
        raise ConfigError(f"objective: {error}") from error


def unknown(field: str, value: Any, known: Iterable[str]) -> str:
    """One line: the field has none of the values that are known."""
    names = sorted(known)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{field} is {value!r}, but must be one of {', '.join(names)}{hint}"


def field_names(config: ml_collections.ConfigDict) -> list[str]:
    """All fields, as ``section.field``."""
    return [path for path, _ in _flatten(config.to_dict())]


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as it is kept in a workdir."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Fields that make two configs different runs, as ``path: old -> new``.

    `FREE_SECTIONS` and the title do not count, nor does ``num_steps``: a run may be
    evaluated otherwise, moved to another mesh, or go on for longer. A field that the
    old one did not have yet had its default.
    """
    new_fields, defaults = dict(_flatten(new)), default_config().to_dict()
    old_fields = {k: v for k, v in _flatten(defaults) if k in new_fields}
    old_fields |= dict(_flatten(old))
    return [
        f"{path}: {old_fields.get(path)!r} -> {new_fields.get(path)!r}"
        for path in sorted(old_fields | new_fields)
        if old_fields.get(path) != new_fields.get(path)
        and path.split(".")[0] not in (*FREE_SECTIONS, "title")
        and not path.endswith(".num_steps")
    ]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.loads(json.dumps(value))
