"""LSUN bedrooms at 256x256: the UNet of DDPM (114 M parameters).

python -m boot_jax.main --config=configs/lsun_bedroom256.py --config.data.path=FOLDER

Not run here; the mark to reach is in BOOT (Gu et al., arXiv 2306.05544, section 4).
Teacher: Ho et al., arXiv 2006.11239, appendix B, but for the schedule, which has the
noise of 64x64 on a fourth of it (Hoogeboom et al., arXiv 2301.11093).

Images: a folder of JPEGs, scaled and cropped on reading; or tensorflow-datasets'
lsun/bedroom, with --config.data.name=tfds:lsun/bedroom and no path.
"""

from boot_jax.config import default_config


def get_config():
    config = default_config()
    config.title = "LSUN bedrooms, 256x256, in one step"
    config.data.name = "folder"
    config.data.image_size = 256
    config.data.channels = 3
    config.schedule.name = "cosine"
    config.schedule.shift = 4.0  # 256 / 64: what an average over 4x4 pixels loses
    config.network.name = "unet"
    config.network.dtype = "bfloat16"
    config.network.remat = "nothing_saveable"
    config.network.unet = {  # attention at 16x16
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": (
            *("DownBlock2D",) * 4,
            "AttnDownBlock2D",
            "DownBlock2D",
        ),
        "up_block_types": (
            "UpBlock2D",
            "AttnUpBlock2D",
            *("UpBlock2D",) * 4,
        ),
        "layers_per_block": 2,
        "attention_head_dim": None,  # one head
        "dropout": 0.0,
    }
    config.teacher.prediction_type = "v_prediction"
    config.teacher.training.num_steps = 2_400_000
    config.teacher.training.batch_size = 64
    config.teacher.training.learning_rate = 2e-5
    config.teacher.training.warmup_steps = 5000
    config.teacher.training.decay = "constant"
    config.teacher.training.b2 = 0.999
    config.teacher.training.ema_decay = 0.9999
    config.objective.kind = "boot"
    config.objective.delta = 0.04
    config.objective.weighting = "x0"
    config.objective.boundary_weight = 1.0
    config.objective.solver = "ddim"  # a second call of this teacher costs too much
    config.distill.num_steps = 300_000
    config.distill.batch_size = 64
    config.distill.learning_rate = 2e-5
    config.distill.warmup_steps = 1000
    config.distill.ema_decay = 0.9999
    config.evaluation.batch_size = 64
    config.run.checkpoint_every = 10_000
    return config
