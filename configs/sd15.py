"""Stable Diffusion 1.5 in one step, from prompts alone: 512x512, 859.5 M parameters.

python -m boot_jax.main --config=configs/sd15.py

Not run here, for lack of the weights: its networks are held against PyTorch's on random
weights and built at full size, its step is compiled, and configs/tiny_sd.py runs the
same path small. Gu et al. (arXiv 2306.05544, section 4) distil it in this way; what is
not in the paper is untuned.

A real run wants a few hundred thousand prompts or more: set prompts.path. The teacher
is kept in bfloat16, the student in float32: about 20 GB, and the activations. On
several devices --config.mesh.fsdp=N shares it among N of them.
"""

from boot_jax.config import default_config


def get_config():
    config = default_config()
    config.title = "Stable Diffusion 1.5 in one step"
    config.data.name = ""
    config.prompts.path = "configs/prompts/starter.txt"
    config.teacher.source = "diffusers"
    config.teacher.path = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.teacher.param_dtype = "bfloat16"
    config.teacher.guidance_scale = 7.5
    config.network.dtype = "bfloat16"
    config.network.remat = "nothing_saveable"
    config.objective.kind = "boot"
    config.objective.solver = "ddim"  # under guidance a call is two
    config.objective.delta = 0.04
    config.objective.boundary_weight = 1.0
    config.objective.boundary_share = 0.25
    config.distill.num_steps = 100_000
    config.distill.batch_size = 64
    config.distill.microbatches = 4
    config.distill.learning_rate = 1e-5
    config.distill.warmup_steps = 1000
    config.distill.decay = "constant"
    config.distill.b2 = 0.999
    config.distill.ema_decay = 0.9999
    config.evaluation.num_images = 512
    config.evaluation.num_real = 512
    config.evaluation.batch_size = 16
    config.evaluation.ddim_steps = (1, 8, 50)
    config.evaluation.ode_steps = 50
    config.evaluation.error_images = 16
    config.evaluation.error_times = 10
    config.sample.num = 16
    config.sample.batch_size = 16
    config.run.checkpoint_every = 2000
    config.run.sample_every = 2000
    return config
