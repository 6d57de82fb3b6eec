"""ImageNet at 64x64 with labels and guidance: the UNet of ADM (296 M parameters).

python -m boot_jax.main --config=configs/imagenet64.py

Not run here. The mark to reach is BOOT's FID of 16.3 in one step (Gu et al., arXiv
2306.05544). Teacher: Dhariwal and Nichol, arXiv 2105.05233, appendix I, with the labels
of a tenth of the images dropped, so that it can be guided.

Images: tensorflow-datasets' imagenet_resized/64x64, prepared as array_record; a folder
of class folders serves as well, with --config.data.name=folder and its path. On few
devices, --config.mesh.fsdp=N shares the parameters among N of them.
"""

from boot_jax.config import default_config


def get_config():
    config = default_config()
    config.title = "ImageNet-64 in one step"
    config.data.name = "tfds:imagenet_resized/64x64"
    config.data.image_size = 64
    config.data.channels = 3
    config.data.random_flip = True
    config.data.labels = True
    config.schedule.name = "cosine"
    config.network.name = "unet"
    config.network.dtype = "bfloat16"
    config.network.unet = {  # attention at 32x32, 16x16 and 8x8
        "block_out_channels": (192, 384, 576, 768),
        "down_block_types": ("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 3),
        "up_block_types": (*("AttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "layers_per_block": 3,
        "attention_head_dim": 64,
        "resnet_time_scale_shift": "scale_shift",
        "dropout": 0.1,
    }
    config.teacher.prediction_type = "v_prediction"
    config.teacher.label_dropout = 0.1
    config.teacher.guidance_scale = 1.5
    config.teacher.thresholding = "clip"  # guidance leads out of [-1, 1]
    config.teacher.training.num_steps = 540_000
    config.teacher.training.batch_size = 2048
    config.teacher.training.learning_rate = 3e-4
    config.teacher.training.warmup_steps = 5000
    config.teacher.training.decay = "constant"
    config.teacher.training.b2 = 0.999
    config.teacher.training.ema_decay = 0.9999
    config.objective.kind = "boot"
    config.objective.delta = 0.04
    config.objective.weighting = "x0"
    config.objective.boundary_weight = 1.0
    config.objective.solver = "ddim"  # guidance already doubles the teacher's batch
    config.distill.num_steps = 300_000
    config.distill.batch_size = 512
    config.distill.learning_rate = 1e-4
    config.distill.warmup_steps = 1000
    config.distill.ema_decay = 0.9999
    config.evaluation.num_images = 10_000
    config.run.checkpoint_every = 10_000
    return config
