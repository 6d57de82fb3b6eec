"""The whole way of Stable Diffusion in three minutes of processor time.

python -m boot_jax.main --config=configs/tiny_sd.py

Its teacher is written before by `python examples/write_tiny_sd.py
runs/tiny_sd_teacher`: a pipeline with a small UNet, text encoder and VAE of random
weights. So the run proves that a folder is read, prompts are tokenised and encoded, a
guided teacher is distilled in latent space, samples are decoded and the student goes
home to diffusers. It cannot prove that images are good: random weights draw noise. For
that see configs/shapes.py.
"""

from boot_jax.config import default_config


def get_config():
    config = default_config()
    config.title = "A tiny Stable Diffusion in one step"
    config.data.name = ""
    config.prompts.path = "configs/prompts/starter.txt"
    config.prompts.negative = "blurry, dull"
    config.teacher.source = "diffusers"
    config.teacher.path = "runs/tiny_sd_teacher"
    config.teacher.guidance_range = (1.0, 4.0)
    config.sample.guidance_scale = 2.0
    config.sample.num = 8
    config.objective.kind = "boot"
    config.objective.solver = "ddim"
    config.objective.boundary_share = 0.25
    config.distill.num_steps = 200
    config.distill.batch_size = 16
    config.distill.learning_rate = 3e-4
    config.distill.warmup_steps = 20
    config.evaluation.update(
        num_images=64,
        num_real=64,
        batch_size=64,
        ddim_steps=(1, 4),
        ode_steps=8,
        error_times=4,
        error_images=16,
        grid_images=8,
    )
    config.run.checkpoint_every = 100
    config.run.sample_every = 100
    config.run.log_every = 10
    return config
