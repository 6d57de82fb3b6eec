"""CIFAR-10 without labels: the UNet of DDPM (35.7 M parameters).

python -m boot_jax.main --config=configs/cifar10.py

Not run here. The mark to reach is an FID of 4.38 in one step, which later papers quote
for BOOT with LPIPS as its distance (Gu et al., arXiv 2306.05544); the squared error of
this config will stay above it. Teacher: Ho et al., arXiv 2006.11239, appendix B.

Images: tensorflow-datasets' cifar10, prepared as array_record; a folder of PNGs serves
as well, with --config.data.name=folder --config.data.path=FOLDER.
"""

from boot_jax.config import default_config


def get_config():
    config = default_config()
    config.title = "CIFAR-10 in one step"
    config.data.name = "tfds:cifar10"
    config.data.image_size = 32
    config.data.channels = 3
    config.data.random_flip = True
    config.schedule.name = "cosine"
    config.network.name = "unet"
    config.network.dtype = "bfloat16"
    config.network.unet = {  # attention at 16x16
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": (
            "DownBlock2D",
            "AttnDownBlock2D",
            "DownBlock2D",
            "DownBlock2D",
        ),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "attention_head_dim": None,  # one head
        "dropout": 0.1,
    }
    # Not epsilon, which says nothing about the image at t = 1, where alpha is 0.
    config.teacher.prediction_type = "v_prediction"
    config.teacher.training.num_steps = 800_000
    config.teacher.training.batch_size = 128
    config.teacher.training.learning_rate = 2e-4
    config.teacher.training.warmup_steps = 5000
    config.teacher.training.decay = "constant"
    config.teacher.training.b2 = 0.999
    config.teacher.training.ema_decay = 0.9999
    config.objective.kind = "boot"
    config.objective.delta = 0.04
    config.objective.weighting = "x0"
    config.objective.boundary_weight = 1.0
    config.objective.solver = "heun"
    config.distill.num_steps = 300_000
    config.distill.batch_size = 256
    config.distill.learning_rate = 1e-4
    config.distill.warmup_steps = 1000
    config.distill.ema_decay = 0.9999
    config.evaluation.num_images = 10_000
    config.run.checkpoint_every = 10_000
    return config
