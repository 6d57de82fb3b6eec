"""FFHQ at 64x64: faces, a UNet of 59 M parameters.

python -m boot_jax.main --config=configs/ffhq64.py --config.data.path=FOLDER

Not run here; the mark to reach is in BOOT (Gu et al., arXiv 2306.05544, section 4),
which claims one step to be as good as the teacher's DDIM with ten. The teacher has the
width, depth, dropout and 200 M training images of the DDPM++ of Karras et al. (arXiv
2206.00364), in the blocks of diffusers.

Images: a folder with the thumbnails, PNGs of at least 64x64.
"""

from boot_jax.config import default_config


def get_config():
    config = default_config()
    config.title = "FFHQ-64 in one step"
    config.data.name = "folder"
    config.data.image_size = 64
    config.data.channels = 3
    config.data.random_flip = True
    config.schedule.name = "cosine"
    config.network.name = "unet"
    config.network.dtype = "bfloat16"
    config.network.unet = {  # attention at 16x16
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": (
            "DownBlock2D",
            "DownBlock2D",
            "AttnDownBlock2D",
            "DownBlock2D",
        ),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "layers_per_block": 4,
        "attention_head_dim": None,  # one head
        "dropout": 0.05,
    }
    config.teacher.prediction_type = "v_prediction"
    config.teacher.training.num_steps = 780_000
    config.teacher.training.batch_size = 256
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
    config.distill.batch_size = 128
    config.distill.learning_rate = 1e-4
    config.distill.warmup_steps = 1000
    config.distill.ema_decay = 0.9999
    config.evaluation.num_images = 10_000
    config.run.checkpoint_every = 10_000
    return config
