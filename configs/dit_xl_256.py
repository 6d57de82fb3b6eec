"""The hub's facebook/DiT-XL-2-256 in one step: ImageNet at 256x256, in latents.

python -m boot_jax.main --config=configs/dit_xl_256.py

Not run here, for lack of the weights; examples/distil_a_hub_model.md has every command.
The student is told the guidance scale, so one training serves all of the range.
"""

from boot_jax.config import default_config


def get_config():
    config = default_config()
    config.title = "DiT-XL/2 in one step"
    config.data.name = ""
    config.teacher.source = "diffusers"
    config.teacher.path = "facebook/DiT-XL-2-256"
    config.teacher.param_dtype = "bfloat16"
    config.teacher.guidance_range = (1.0, 4.0)
    config.sample.guidance_scale = 4.0
    config.network.dtype = "bfloat16"
    config.network.remat = "nothing_saveable"
    config.objective.t_max = 0.98  # of an epsilon teacher; see ddpm_cifar10.py
    config.objective.kind = "boot"
    config.objective.solver = "ddim"  # under guidance a call is two
    config.distill.num_steps = 300_000
    config.distill.batch_size = 256
    config.distill.microbatches = 4
    config.distill.learning_rate = 1e-4
    config.distill.warmup_steps = 1000
    config.distill.ema_decay = 0.9999
    config.mesh.fsdp = 8
    config.evaluation.num_images = 5000
    config.run.checkpoint_every = 5000
    config.run.sample_every = 5000
    return config
