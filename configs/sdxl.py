"""Stable Diffusion XL in one step, from prompts alone: 1024x1024, 2,567 M parameters.

python -m boot_jax.main --config=configs/sdxl.py

Not run here, for lack of the weights; see sd15.py for what of it is tested, and what a
run wants. The student with its optimizer takes 51 GB, so the config shares it among 8
devices. Its VAE decodes in float32.
"""

from boot_jax.config import default_config


def get_config():
    config = default_config()
    config.title = "Stable Diffusion XL in one step"
    config.data.name = ""
    config.prompts.path = "configs/prompts/starter.txt"
    config.teacher.source = "diffusers"
    config.teacher.path = "stabilityai/stable-diffusion-xl-base-1.0"
    config.teacher.param_dtype = "bfloat16"
    config.teacher.guidance_scale = 5.0
    config.network.dtype = "bfloat16"
    config.network.remat = "nothing_saveable"
    config.objective.kind = "boot"
    config.objective.solver = "ddim"  # under guidance a call is two
    config.objective.boundary_share = 0.25
    config.distill.num_steps = 100_000
    config.distill.batch_size = 64
    config.distill.microbatches = 2
    config.distill.learning_rate = 1e-5
    config.distill.warmup_steps = 1000
    config.distill.decay = "constant"
    config.distill.b2 = 0.999
    config.distill.ema_decay = 0.9999
    config.mesh.fsdp = 8
    config.evaluation.num_images = 256
    config.evaluation.num_real = 256
    config.evaluation.batch_size = 8
    config.evaluation.ddim_steps = (1, 8, 50)
    config.evaluation.ode_steps = 50
    config.evaluation.error_images = 8
    config.evaluation.error_times = 10
    config.sample.num = 16
    config.sample.batch_size = 8
    config.run.checkpoint_every = 2000
    config.run.sample_every = 2000
    return config
