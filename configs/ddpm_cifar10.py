"""The hub's google/ddpm-cifar10-32 in one step: 35.7 M parameters, unconditional.

python -m boot_jax.main --config=configs/ddpm_cifar10.py

Not run here, for lack of the weights; examples/distil_a_hub_model.md has every command.
Images are not needed: the student is scored against its teacher's own samples.
"""

from boot_jax.config import default_config


def get_config():
    config = default_config()
    config.title = "DDPM of CIFAR-10 in one step"
    config.data.name = ""
    config.teacher.source = "diffusers"
    config.teacher.path = "google/ddpm-cifar10-32"
    config.network.dtype = "bfloat16"
    # An epsilon teacher divides by alpha, which is 0.006 at t = 1.
    config.objective.t_max = 0.98
    config.objective.kind = "boot"
    config.objective.solver = "heun"
    config.distill.num_steps = 300_000
    config.distill.batch_size = 256
    config.distill.learning_rate = 1e-4
    config.distill.warmup_steps = 1000
    config.distill.ema_decay = 0.9999
    config.evaluation.num_images = 10_000
    config.run.checkpoint_every = 10_000
    config.run.sample_every = 10_000
    return config
