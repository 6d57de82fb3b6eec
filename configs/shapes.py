"""Coloured shapes from captions: text-to-image in one step, on two cores.

python -m boot_jax.main --config=configs/shapes.py

A teacher learns 16x16 shapes with captions ("a small red square at left on white"),
which are drawn as they are needed. A student is distilled from the captions alone, of
configs/prompts/shapes.txt, which was written with

python -c "from boot_jax import shapes; print(*shapes.captions(), sep='\\n')"

benchmarks/shapes.py scores a run. Of 200 held-out seeds, colour and shape are right in
96 % for one step of the student and in 98 % for 50 of the teacher; the whole takes 22
minutes of processor time. The README has the ablation of the boundary loss.
"""

from boot_jax.config import default_config


def get_config():
    config = default_config()
    config.title = "Coloured shapes from captions, in one step"
    config.data.name = "shapes"
    config.data.captions = True
    config.prompts.path = "configs/prompts/shapes.txt"
    config.schedule.shift = 2.0  # a few large areas are seen through much noise
    config.network.name = "dit"
    config.network.dit = {
        "patch_size": 16,
        "hidden_size": 256,
        "num_layers": 2,
        "num_heads": 4,
        "mlp_ratio": 4.0,
    }
    config.teacher.prediction_type = "sample"
    config.teacher.guidance_scale = 1.5
    config.teacher.thresholding = "clip"  # guidance leads out of [-1, 1]
    config.teacher.training.num_steps = 6000
    config.teacher.training.batch_size = 64
    config.teacher.training.learning_rate = 2e-3
    config.teacher.training.ema_decay = 0.995
    # As for the digits: the continuous form has the boundary condition within.
    config.objective.kind = "continuous"
    config.objective.boundary_weight = 0.0
    config.objective.adaptive_power = 1.0
    config.distill.num_steps = 4000
    config.distill.batch_size = 64
    config.distill.learning_rate = 1e-3
    config.distill.ema_decay = 0.995
    config.evaluation.num_images = 500
    config.evaluation.num_real = 2000
    config.evaluation.batch_size = 100
    config.evaluation.ddim_steps = (1, 8, 50)
    config.evaluation.ode_steps = 40
    config.run.sample_every = 1000
    return config
