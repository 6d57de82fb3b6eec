"""Exports in PyTorch diffusers, unmodified: the same noise gives the same image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finished_students import finished_student

from boot_jax.export.diffusers import save_pipeline, stock_model
from boot_jax.export.finished import ExportError
from boot_jax.schedules import get_schedule

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


def assert_same_images(ours, theirs):
    ours = np.clip(ours / 2 + 0.5, 0, 1)
    assert ours.shape == theirs.shape
    # Most pixels are not at the ends, where anything would agree.
    assert np.mean((ours > 0) & (ours < 1)) > 0.3
    assert np.abs(ours - theirs).max() < 1e-4


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
    ],
)
def test_one_stock_step_is_the_students_conversion(
    tmp_path, schedule, prediction_type, t_max
):
    name, options = schedule
    finished = finished_student(
        schedule=get_schedule(name, **options),
        prediction_type=prediction_type,
        t_max=t_max,
    )
    pipeline = diffusers.DDIMPipeline.from_pretrained(saved(finished, tmp_path))
    kept = unclipped(pipeline)
    their_images(pipeline, batch_size=3, num_inference_steps=1)
    ours = our_samples(finished, torch_noise(finished, 3))
    # An epsilon teacher's output is divided by alpha, and so is its rounding.
    assert len(kept) == 1
    assert np.abs(ours - kept[0]).max() < 2e-5 * np.abs(ours).max()


@pytest.mark.parametrize("name", ["DDIMPipeline", "DDPMPipeline", "DiffusionPipeline"])
def test_stock_pipelines_give_our_images_in_one_step(tmp_path, name):
    finished = finished_student(sample_shape=(8, 16, 3))
    pipeline = getattr(diffusers, name).from_pretrained(saved(finished, tmp_path))
    theirs = their_images(pipeline, batch_size=3, num_inference_steps=1)
    assert_same_images(our_samples(finished, torch_noise(finished, 3)), theirs)
    with pytest.raises(ValueError, match="num_inference_steps"):
        pipeline()  # 50 or 1000 steps, by default


@pytest.mark.parametrize(
    "options",
    [
        {"time_embedding_type": "fourier"},
        {"time_embedding_type": "fourier", "time_conditioning": "reused"},
        {"time_embedding_type": "learned", "num_train_timesteps": 1001},
        {"time_conditioning": "reused"},
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
    theirs = their_images(pipeline, batch_size=2, num_inference_steps=1)
    assert_same_images(our_samples(finished, torch_noise(finished, 2)), theirs)


@pytest.mark.parametrize("guidance_scale", [None, 3.0])
def test_classes_go_out_with_the_one_file_pipeline(tmp_path, guidance_scale):
    finished = finished_student(num_classes=4, guidance_scale=guidance_scale)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        saved(finished, tmp_path), trust_remote_code=True
    )
    labels = [3, 0, 0]
    theirs = their_images(pipeline, class_labels=labels)
    assert_same_images(our_samples(finished, torch_noise(finished, 3), labels), theirs)
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
