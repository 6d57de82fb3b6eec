"""Teachers in diffusers format, against PyTorch diffusers that saved their folders."""

import json
import pathlib
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pipelines
import pytest
import torch
from test_unet import CONFIGS, TWO_LEVELS, inputs, run_torch, torch_model

from boot_jax.guidance import guide
from boot_jax.models.weights import WeightsError
from boot_jax.prediction import Thresholding
from boot_jax.sampling import many_steps, to_images
from boot_jax.student import create_student
from boot_jax.teachers.base import Teacher, TeacherError, as_sampled
from boot_jax.teachers.diffusers import load_teacher

# More of the UNet's shapes are in its own tests; these go through a folder.
UNETS = ("ddpm", "fourier", "labels", "resnet resampling", "learned")
DITS: dict[str, dict[str, Any]] = {
    "learned variance": {},
    "plain output": {"out_channels": None, "in_channels": 3, "patch_size": 4},
    "exact gelu": {"activation_fn": "gelu", "norm_eps": 1e-3, "num_layers": 1},
    "no bias": {"attention_bias": False, "num_attention_heads": 4},
}


def saved(pipeline: Any, folder: pathlib.Path) -> str:
    pipeline.save_pretrained(folder)
    return str(folder)


def outputs_of_dit(model: Any, teacher: Teacher) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, *teacher.sample_shape)).astype(np.float32)
    time, label = np.array([0, 350, 999], np.float32), np.array([0, 4, 5], np.int32)
    with torch.no_grad():
        images = torch.tensor(x).permute(0, 3, 1, 2)
        expected = model(images, torch.tensor(time), torch.tensor(label)).sample
    return apply(teacher, x, time, label), expected.permute(0, 2, 3, 1).numpy()


def apply(teacher: Teacher, x: Any, time: Any, label: Any) -> np.ndarray:
    network = teacher.network
    assert network is not None
    condition = None if label is None else {"label": label}
    variables = {"params": teacher.params}
    return np.asarray(jax.jit(network.apply)(variables, x, time, condition))


@pytest.mark.parametrize("name", UNETS)
def test_unet_of_a_folder_equals_pytorch(name: str, tmp_path: pathlib.Path):
    config = TWO_LEVELS | CONFIGS[name]
    model = torch_model(config)
    teacher = load_teacher(saved(pipelines.ddpm_pipeline(model), tmp_path))
    x, time, label = inputs(config)
    expected = run_torch(model, x, time, label)
    assert 0.2 < np.std(expected) < 5
    actual = apply(teacher, x, time, label)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    assert teacher.sample_shape == (8, 8, 3)
    assert teacher.num_classes == config.get("num_class_embeds")


@pytest.mark.parametrize("name", DITS)
def test_dit_of_a_folder_equals_pytorch(name: str, tmp_path: pathlib.Path):
    model = pipelines.dit(**DITS[name])
    channels = model.config["in_channels"]
    vae = pipelines.vae(latent_channels=channels)
    teacher = load_teacher(saved(pipelines.dit_pipeline(model, vae), tmp_path))
    actual, expected = outputs_of_dit(model, teacher)
    assert 0.2 < np.std(expected) < 5
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    assert (teacher.num_classes, teacher.has_null_label) == (5, True)
    assert teacher.image_shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_bfloat16_agrees_within_its_rounding(kind: str, tmp_path: pathlib.Path):
    if kind == "unet":
        pipeline = pipelines.ddpm_pipeline(pipelines.unet())
    else:
        pipeline = pipelines.dit_pipeline(pipelines.dit(), pipelines.vae())
    folder = saved(pipeline, tmp_path)
    exact, rounded = load_teacher(folder), load_teacher(folder, dtype=jnp.bfloat16)
    x = np.random.default_rng(0).normal(size=(2, *exact.sample_shape))
    label = None if kind == "unet" else np.array([1, 2], np.int32)
    args = (x.astype(np.float32), np.array([3, 700], np.float32), label)
    expected, actual = apply(exact, *args), apply(rounded, *args)
    assert actual.dtype == np.float32
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 0.04


@pytest.fixture(scope="module")
def model() -> Any:
    return pipelines.unet()


@pytest.fixture(scope="module")
def small_model() -> Any:
    return pipelines.unet(**pipelines.ONE_LEVEL)


def sample(teacher: Teacher, denoise: Any, x: Any, condition: Any = None) -> np.ndarray:
    """Images of our DDIM in [0, 1], 20 steps of the folder's spacing."""
    assert teacher.sampler_steps is not None
    steps = teacher.sampler_steps(20)
    generate = many_steps(denoise, teacher.params, teacher.schedule, 20, steps=steps)
    images = to_images(teacher.decoder, np.asarray(generate(x, condition)))
    return np.clip(images / 2 + 0.5, 0, 1)


def noise(shape: tuple[int, ...]) -> jax.Array:
    """What a PyTorch pipeline starts from, for a generator of seed 1."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return jnp.asarray(drawn.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_ddim_equals_pytorch(
    small_model: Any, prediction_type: str, spacing: str, tmp_path: pathlib.Path
):
    scheduler = {"prediction_type": prediction_type, "timestep_spacing": spacing}
    check_ddim(small_model, pipelines.MILD | scheduler, tmp_path)


@pytest.mark.parametrize(
    "scheduler",
    [
        {"clip_sample": True, "prediction_type": "epsilon"},
        {"clip_sample": True, "clip_sample_range": 0.3, "prediction_type": "sample"},
        {"thresholding": True, "sample_max_value": 1.5, "prediction_type": "epsilon"},
        {"set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "sample"},
        {
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
        },
        {
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction",
            "num_train_timesteps": 130,  # 20 steps do not divide it
            "timestep_spacing": "linspace",
        },
    ],
    ids=["clip", "clip range", "dynamic", "to step 0", "zero SNR", "uneven"],
)
def test_ddim_of_other_schedulers_equals_pytorch(
    small_model: Any, scheduler: dict[str, Any], tmp_path: pathlib.Path
):
    check_ddim(small_model, pipelines.MILD | scheduler, tmp_path)


def check_ddim(model: Any, scheduler: dict[str, Any], folder: pathlib.Path) -> None:
    pipeline = pipelines.ddim_pipeline(model, **scheduler)
    teacher = load_teacher(saved(pipeline, folder))
    thresholding = teacher.thresholding
    assert thresholding is not None
    expected = pipeline(
        batch_size=2,
        generator=torch.Generator().manual_seed(1),
        num_inference_steps=20,
        output_type="np",
        # Where x_0 is clipped, an ODE needs the noise that goes with what is left.
        use_clipped_model_output=thresholding.kind != "none",
    ).images
    denoise = as_sampled(teacher.denoise, thresholding=thresholding)
    actual = sample(teacher, denoise, noise((2, 3, 8, 8)))
    inside = (expected > 0) & (expected < 1)
    assert inside.mean() > 0.1
    np.testing.assert_allclose(actual, expected, atol=1e-3)
    assert teacher.prediction_type == scheduler["prediction_type"]


def test_dit_pipeline_with_guidance_equals_pytorch(tmp_path: pathlib.Path):
    # The null label 1000 is written into PyTorch's pipeline.
    model = pipelines.dit(num_embeds_ada_norm=1000)
    pipeline = pipelines.dit_pipeline(model, pipelines.vae(), **pipelines.MILD)
    teacher = load_teacher(saved(pipeline, tmp_path))
    expected = pipeline(
        class_labels=[7, 999],
        guidance_scale=2.5,
        generator=torch.Generator().manual_seed(1),
        num_inference_steps=20,
        output_type="np",
    ).images
    null = {"label": jnp.full((1,), teacher.num_classes, jnp.int32)}
    condition = {"label": jnp.array([7, 999], jnp.int32)}
    denoise = guide(teacher.denoise, null, 2.5)
    actual = sample(teacher, denoise, noise((2, 4, 8, 8)), condition)
    assert actual.shape == (2, 16, 16, 3)
    assert ((expected > 0) & (expected < 1)).mean() > 0.5
    np.testing.assert_allclose(actual, expected, atol=1e-3)
    without = sample(teacher, teacher.denoise, noise((2, 4, 8, 8)), condition)
    assert np.abs(without - actual).max() > 0.01


def test_student_of_a_learned_variance_starts_as_its_teacher(tmp_path: pathlib.Path):
    model = pipelines.unet(**pipelines.ONE_LEVEL, out_channels=6)
    pipeline = pipelines.ddpm_pipeline(model)
    check_student(load_teacher(saved(pipeline, tmp_path)), {}, {})


def test_student_of_a_dit_starts_as_its_teacher(tmp_path: pathlib.Path):
    model = pipelines.dit(num_layers=1)
    pipeline = pipelines.dit_pipeline(model, pipelines.vae())
    teacher = load_teacher(saved(pipeline, tmp_path))
    label = {"label": jnp.array([0, 5], jnp.int32)}
    told = {"guidance_scale": jnp.array([1.0, 3.0])}
    grads = check_student(teacher, label, told, guidance_range=(1.0, 4.0))
    for name in ("target_time", "guidance_scale"):
        assert jnp.abs(grads[name]["linear_2"]["kernel"]).max() > 1e-6


def check_student(
    teacher: Teacher, own: dict[str, Any], told: dict[str, Any], **options: Any
) -> Any:
    """Its first signal is the teacher's estimate; gives the new embeddings' slope."""
    student = create_student(teacher, **options)
    params = student.init(jax.random.key(0))
    eps = jax.random.normal(jax.random.key(1), (2, *teacher.sample_shape))
    t, start = jnp.array([0.3, 0.8]), jnp.ones(2)

    @jax.jit
    def run(params: Any) -> Any:
        def loss(added: Any) -> Any:
            weights = params | {"added_embeddings": added}
            y = student.signal(weights, eps, t, own | told or None)
            return jnp.mean(y**2), y

        return jax.grad(loss, has_aux=True)(params["added_embeddings"])

    grads, y = run(params)
    x_0 = jax.jit(teacher.denoise)(teacher.params, eps, start, own or None)
    assert y.shape == eps.shape
    np.testing.assert_allclose(y, x_0, atol=1e-5 * float(jnp.abs(x_0).max()))
    return grads


def test_remat_changes_no_output(tmp_path: pathlib.Path):
    pipeline = pipelines.dit_pipeline(pipelines.dit(), pipelines.vae())
    folder = saved(pipeline, tmp_path)
    plain, remat = load_teacher(folder), load_teacher(folder, remat="nothing_saveable")
    args = (np.ones((1, 8, 8, 4), "f"), np.ones(1, "f"), np.array([2], np.int32))
    np.testing.assert_allclose(
        apply(plain, *args), apply(remat, *args), rtol=1e-5, atol=1e-5
    )
    network = remat.network
    assert network is not None
    condition = {"label": args[2]}
    program = jax.make_jaxpr(network.apply)(
        {"params": remat.params}, *args[:2], condition
    )
    assert "remat" in str(program) or "checkpoint" in str(program)


def test_every_layout_of_the_files_gives_one_teacher(
    model: Any, tmp_path: pathlib.Path
):
    pipeline = pipelines.ddpm_pipeline(model)
    plain = load_teacher(saved(pipeline, tmp_path / "plain"))
    pipeline.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len([*(tmp_path / "sharded" / "unet").glob("*.safetensors")]) > 1
    packed = tmp_path / "packed"
    saved(pipeline, packed)
    next((packed / "unet").glob("*.safetensors")).unlink()
    (packed / "unet" / "diffusion_flax_model.msgpack").write_bytes(
        flax.serialization.to_bytes(plain.params)
    )
    # An early pipeline of one network: everything side by side.
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in [*(tmp_path / "plain").rglob("*")]:
        if file.is_file():
            (flat / file.name).write_bytes(file.read_bytes())
    for name in ("sharded", "packed", "flat"):
        other = load_teacher(str(tmp_path / name))
        assert other.fingerprint() == plain.fingerprint(), name


def test_older_transformer_configs_are_read(tmp_path: pathlib.Path):
    pipeline = pipelines.dit_pipeline(pipelines.dit(), pipelines.vae())
    folder = saved(pipeline, tmp_path)
    new = load_teacher(folder).fingerprint()
    older = {"only_cross_attention": False, "num_vector_embeds": None}
    edit(tmp_path / "transformer" / "config.json", **older)
    entry = ["diffusers", "Transformer2DModel"]
    edit(tmp_path / "model_index.json", transformer=entry)
    assert load_teacher(folder).fingerprint() == new
    edit(tmp_path / "transformer" / "config.json", only_cross_attention=True)
    with pytest.raises(TeacherError, match=r"config\.json: .*only_cross_attention"):
        load_teacher(folder)


def edit(file: pathlib.Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


def test_the_last_class_may_mean_none(tmp_path: pathlib.Path):
    folder = saved(
        pipelines.ddpm_pipeline(pipelines.unet(num_class_embeds=5)), tmp_path
    )
    teacher = load_teacher(folder)
    assert (teacher.num_classes, teacher.has_null_label) == (5, False)
    teacher = load_teacher(folder, null_label=True)
    assert (teacher.num_classes, teacher.has_null_label) == (4, True)


def test_thresholding_is_part_of_who_a_teacher_is(model: Any, tmp_path: pathlib.Path):
    folder = saved(pipelines.ddpm_pipeline(model), tmp_path)
    clipped = load_teacher(folder)
    assert clipped.thresholding == Thresholding("clip")
    edit(tmp_path / "scheduler" / "scheduler_config.json", clip_sample=False)
    free = load_teacher(folder)
    assert free.thresholding == Thresholding("none")
    assert free.fingerprint() != clipped.fingerprint()


def test_misfits_are_listed_by_name(model: Any, tmp_path: pathlib.Path):
    folder = saved(pipelines.ddpm_pipeline(model), tmp_path)
    edit(tmp_path / "unet" / "config.json", out_channels=6, add_attention=False)
    with pytest.raises(WeightsError) as error:
        load_teacher(folder)
    message = str(error.value)
    assert "unexpected: mid_block.attentions.0.group_norm.bias" in message
    assert "conv_out.bias is (3,), not (6,)" in message
    edit(tmp_path / "unet" / "config.json", out_channels=3, add_attention=True)
    edit(tmp_path / "unet" / "config.json", num_class_embeds=4)
    with pytest.raises(WeightsError, match=r"missing: class_embedding\.weight"):
        load_teacher(folder)
