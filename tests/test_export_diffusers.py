"""Exports in PyTorch diffusers, unmodified: the same noise gives the same image."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finished_students import finished_student

from boot_jax.export.artifact import serialize
from boot_jax.export.diffusers import save_pipeline, scheduler_config, stock_model
from boot_jax.export.finished import ExportError
from boot_jax.export.folding import stock_conversion
from boot_jax.schedules import get_schedule
from boot_jax.teachers.base import Decoder
from boot_jax.teachers.folder import Component

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()
diffusers.logging.disable_progress_bar()


def saved(finished, folder):
    folder.mkdir(exist_ok=True)
    save_pipeline(folder, stock_model(finished), finished.num_classes)
    return folder


def torch_noise(finished, num, seed=0):
    """What a pipeline draws, as it draws it; ``[B, H, W, C]``."""
    height, width, channels = finished.sample_shape
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((num, channels, height, width), generator=generator)
    return noise.permute(0, 2, 3, 1).numpy()


def our_samples(finished, noise, labels=None):
    """As our sampler gives them, in [-1, 1] if they were images."""
    label = None if labels is None else jnp.asarray(labels, jnp.int32)
    return np.asarray(jax.jit(finished)(finished.params, jnp.asarray(noise), label))


def their_images(pipeline, seed=0, **options):
    """In [0, 1], as pipelines show them."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipeline(generator=generator, output_type="np", **options).images


def unclipped(pipeline):
    """Keeps what the scheduler made of the noise, before a pipeline clips it."""
    kept, step = [], pipeline.scheduler.step

    def keeping(*arguments, **options):
        output = step(*arguments, **options)
        kept.append(output.prev_sample.permute(0, 2, 3, 1).numpy())
        return output

    pipeline.scheduler.step = keeping
    return kept


def assert_same_samples(ours, kept):
    """Of one step, before clipping: also where a random network leaves the range."""
    assert len(kept) == 1 and kept[0].shape == ours.shape
    # An epsilon teacher's output is divided by alpha, and so is its rounding.
    assert np.abs(ours - kept[0]).max() < 1e-4 * np.abs(ours).max()


@pytest.mark.parametrize(
    "schedule, prediction_type, t_max",
    [
        (("cosine", {}), "v_prediction", 1.0),  # no signal at all at the end
        (("cosine", {}), "epsilon", 0.99),
        (("cosine", {}), "sample", 1.0),
        (("linear_beta", {}), "epsilon", 1.0),  # alpha is 0.0066
        (("discrete", {}), "epsilon", 1.0),
        (("discrete", {"rescale_betas_zero_snr": True}), "v_prediction", 1.0),
        (("edm", {}), "v_prediction", 1.0),
        (("edm", {"sigma_max": 20.0}), "epsilon", 1.0),
        (("flow", {}), "flow_prediction", 1.0),
        (("flow", {"shift": 3.0}), "flow_prediction", 0.95),
        (("flow", {}), "epsilon", 0.9),
        (("edm", {}), "edm_prediction", 1.0),
        (("edm", {"sigma_max": 1348.0}), "score", 1.0),
    ],
)
@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_conversion_is_one_step_of_a_stock_scheduler(
    schedule, prediction_type, t_max, num_steps
):
    name, options = schedule
    schedule = get_schedule(name, **options)
    finished = finished_student(
        schedule=schedule, prediction_type=prediction_type, t_max=t_max
    )
    conversion = stock_conversion(finished, num_steps)
    scheduler = diffusers.DDIMScheduler(**scheduler_config(conversion))
    scheduler.set_timesteps(1)
    (time,) = scheduler.timesteps
    assert num_steps - 1 <= time < 8
    eps, output = np.random.default_rng(0).standard_normal((2, 64), np.float32)
    theirs = scheduler.step(
        torch.tensor(
            output * np.float32(conversion.output_scale)
            + np.float32(conversion.output_offset)
        ),
        time,
        torch.tensor(eps),
    ).prev_sample
    # The paper's, in float64.
    t = jnp.asarray(t_max)
    alpha, sigma = (float(f(t)) for f in (schedule.alpha, schedule.sigma))
    x_t = np.hypot(alpha, sigma) * eps.astype(float)
    ours = {
        "epsilon": lambda: (x_t - sigma * output) / alpha,
        "v_prediction": lambda: (alpha * eps - sigma * output) / np.hypot(alpha, sigma),
        "sample": lambda: output,
        "flow_prediction": lambda: (x_t - sigma * output) / (alpha + sigma),
        "score": lambda: (x_t + sigma**2 * output) / alpha,
        "edm_prediction": lambda: (
            (alpha * eps + sigma * output) / np.hypot(alpha, sigma)
        ),
    }[prediction_type]()
    # A type that DDIM knows stays what it is, and so do the weights.
    if prediction_type in ("epsilon", "v_prediction", "sample"):
        assert conversion.prediction_type == prediction_type
        assert conversion.output_scale == 1
    assert conversion.output_offset == 0
    assert np.abs(theirs.numpy() - ours).max() < 4e-6 * np.abs(ours).max()


@pytest.mark.parametrize(
    "schedule, prediction_type, t_max",
    [
        (get_schedule("linear_beta"), "epsilon", 1.0),
        (get_schedule("flow", shift=3.0), "flow_prediction", 0.95),
    ],
)
def test_a_pipeline_of_any_schedule_gives_our_samples(
    tmp_path, schedule, prediction_type, t_max
):
    finished = finished_student(
        schedule=schedule, prediction_type=prediction_type, t_max=t_max
    )
    pipeline = diffusers.DDIMPipeline.from_pretrained(saved(finished, tmp_path))
    kept = unclipped(pipeline)
    their_images(pipeline, batch_size=3, num_inference_steps=1)
    assert_same_samples(our_samples(finished, torch_noise(finished, 3)), kept)


def test_stock_pipelines_give_our_images_in_one_step(tmp_path):
    finished = finished_student(sample_shape=(8, 16, 3))
    ours = our_samples(finished, torch_noise(finished, 3))
    saved(finished, tmp_path)
    for name in ("DDIMPipeline", "DDPMPipeline", "DiffusionPipeline"):
        pipeline = getattr(diffusers, name).from_pretrained(tmp_path)
        kept = unclipped(pipeline)
        theirs = their_images(pipeline, batch_size=3, num_inference_steps=1)
        assert_same_samples(ours, kept)
        assert np.abs(np.clip(ours / 2 + 0.5, 0, 1) - theirs).max() < 1e-4
        with pytest.raises(ValueError, match="num_inference_steps"):
            pipeline()  # 50 or 1000 steps, by default


@pytest.mark.parametrize(
    "options",
    [
        {"time_embedding_type": "fourier"},
        {"time_embedding_type": "fourier", "time_conditioning": "reused"},
        {
            "time_embedding_type": "learned",
            "num_train_timesteps": 1001,
            "out_channels": 2,  # with a learned variance
        },
        {"center_input_sample": True, "act_fn": "gelu"},
        {
            "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
            "resnet_time_scale_shift": "scale_shift",
            "add_attention": False,
        },
    ],
    ids=str,
)
def test_every_kind_of_unet_goes_out(tmp_path, options):
    finished = finished_student(**options)
    pipeline = diffusers.DDIMPipeline.from_pretrained(saved(finished, tmp_path))
    kept = unclipped(pipeline)
    their_images(pipeline, batch_size=2, num_inference_steps=1)
    assert_same_samples(our_samples(finished, torch_noise(finished, 2)), kept)


@pytest.mark.parametrize("guidance_scale", [None, 3.0])
def test_classes_go_out_with_the_one_file_pipeline(tmp_path, guidance_scale):
    finished = finished_student(num_classes=4, guidance_scale=guidance_scale)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        saved(finished, tmp_path), trust_remote_code=True
    )
    labels = [3, 0, 0]
    kept = unclipped(pipeline)
    theirs = their_images(pipeline, class_labels=labels)
    assert_same_samples(our_samples(finished, torch_noise(finished, 3), labels), kept)
    assert np.abs(theirs[0] - their_images(pipeline, class_labels=[1])[0]).max() > 0.01
    for wrong, message in ((None, "give class_labels"), ([4], "from 0 to 3")):
        with pytest.raises(ValueError, match=message):
            pipeline(class_labels=wrong)


def test_the_guidance_scale_is_folded_in():
    one, other = (
        stock_model(finished_student(num_classes=4, guidance_scale=scale)).tensors
        for scale in (1.0, 4.0)
    )
    different = {name for name in one if not np.array_equal(one[name], other[name])}
    assert different == {"time_embedding.linear_2.bias"}


def test_a_scaled_and_centred_input_has_no_place():
    finished = finished_student(
        schedule=get_schedule("flow"),
        prediction_type="flow_prediction",
        t_max=0.9,
        center_input_sample=True,
    )
    with pytest.raises(ExportError, match="center_input_sample"):
        stock_model(finished)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_classes": 3, "guidance_scale": 2.0, "mlp_ratio": 2.0},
        {
            "sample_shape": (8, 8, 3),
            "patch_size": 4,
            "num_classes": 3,
            "schedule": get_schedule("flow"),
            "prediction_type": "flow_prediction",
        },
        {"network": "transformer", "num_classes": 3, "out_channels": 2},
        {"network": "transformer", "num_classes": 3, "time_conditioning": "reused"},
    ],
    ids=str,
)
def test_transformers_go_out_with_the_one_file_pipeline(tmp_path, options):
    finished = finished_student(**{"network": "dit"} | options)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        saved(finished, tmp_path),
        custom_pipeline=str(tmp_path),
        trust_remote_code=True,
    )
    labels, asked = None, {"batch_size": 2}
    if finished.num_classes is not None:
        labels = [2, 0]
        asked = {"class_labels": labels}
    kept = unclipped(pipeline)
    their_images(pipeline, **asked)
    assert_same_samples(our_samples(finished, torch_noise(finished, 2), labels), kept)


def test_diffusers_has_no_transformer_that_reads_words():
    finished = finished_student("dit")
    network = finished.network.clone(vocab_size=5, text_length=3)
    student = dataclasses.replace(finished.student, network=network)
    with pytest.raises(
        ExportError, match=r"labels, and this one reads text; use"
    ) as no:
        stock_model(dataclasses.replace(finished, student=student))
    assert "\n" not in str(no.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sample_shape": (8, 4, 1)}, "square images only, not 8x4"),
        ({"mlp_ratio": 6.0}, "mlp_ratio 4, and this one has 6"),
    ],
)
def test_what_diffusers_has_no_transformer_for(options, message):
    with pytest.raises(ExportError, match=message):
        stock_model(finished_student("dit", **options))


def test_a_latent_transformer_goes_out_in_the_stock_pipeline(tmp_path):
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.7,
    )
    vae.save_pretrained(tmp_path / "vae")
    finished = finished_student(
        "transformer", sample_shape=(8, 8, 4), num_classes=3, guidance_scale=2.0
    )
    folder = tmp_path / "export"
    folder.mkdir()
    part = Component("AutoencoderKL", tmp_path / "vae", {})
    save_pipeline(folder, stock_model(finished, {"vae": part}), 3)
    pipeline = diffusers.DiTPipeline.from_pretrained(folder)
    theirs = their_images(
        pipeline, class_labels=[2, 0], guidance_scale=1, num_inference_steps=1
    )
    ours = our_samples(finished, torch_noise(finished, 2), [2, 0])
    with torch.no_grad():
        latents = torch.tensor(ours).permute(0, 3, 1, 2) / 0.7
        decoded = vae.decode(latents).sample.permute(0, 2, 3, 1).numpy()
    assert np.abs(np.clip(decoded / 2 + 0.5, 0, 1) - theirs).max() < 5e-4
    assert theirs.std() > 0.05


@pytest.mark.parametrize(
    "prediction_type, scale, shift, time_embedding_type",
    [
        ("edm_prediction", 0.5, 0.0, "positional"),  # Karras et al.
        ("score", 2.0, -1.0, "fourier"),  # NCSN++, whose pixels are in [0, 1]
        ("sample", 2.0, -1.0, "positional"),
    ],
)
def test_an_affine_decoder_is_folded_in(
    tmp_path, prediction_type, scale, shift, time_embedding_type
):
    finished = finished_student(
        schedule=get_schedule("edm", sigma_max=20.0),
        prediction_type=prediction_type,
        time_embedding_type=time_embedding_type,
    )
    decoder = Decoder(
        decode=lambda params, x: jnp.clip(scale * x + shift, -1, 1),
        params=None,
        image_shape=finished.sample_shape,
    )
    teacher = dataclasses.replace(finished.teacher, decoder=decoder)
    finished = dataclasses.replace(finished, teacher=teacher)
    pipeline = diffusers.DDIMPipeline.from_pretrained(saved(finished, tmp_path))
    kept = unclipped(pipeline)
    their_images(pipeline, batch_size=2, num_inference_steps=1)
    samples = our_samples(finished, torch_noise(finished, 2))
    assert_same_samples(scale * samples + shift, kept)
    pytest.importorskip("flatbuffers")
    artifact = jax.export.deserialize(bytearray(serialize(finished)))
    images = np.clip(scale * samples + shift, -1, 1)
    ours = np.asarray(artifact.call(torch_noise(finished, 2)))
    assert np.abs(ours - images).max() < 1e-5
