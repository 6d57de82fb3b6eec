"""The choices of a correction, each turned by itself, on the digits.

python -m boot_jax.main --config=configs/digits_correction.py --mode=compare

One teacher, and 2,000 steps for all. What came of it is in docs/correction.md. Some of
it, by more than one process in the same workdir:

    --config.compare.kinds=corrected,alone --config.compare.seeds=0,
"""

import pathlib
import runpy

DIGITS = runpy.run_path(str(pathlib.Path(__file__).with_name("digits.py")))


def corrected(**changed):
    """The digits' correction, with other choices for some."""
    fields = [f"objective.correction.{name}={value}" for name, value in changed.items()]
    return (*DIGITS["METHODS"]["corrected"], *fields)


VARIANTS = {
    "corrected": corrected(),  # as configs/digits.py
    "continuous": DIGITS["METHODS"]["continuous"],  # without
    "strength_003": corrected(strength=0.03),
    "strength_03": corrected(strength=0.3),
    "strength_1": corrected(strength=1.0),
    "alone": corrected(trajectory_weight=0.0),
    "auxiliary_whole": corrected(auxiliary_share=1.0),
    "times_noisy": corrected(time_range="(0.5,0.95)"),
    "times_clean": corrected(time_range="(0.05,0.5)"),
    "share_half": corrected(share=0.5),
    "rate_constant": corrected(decay="constant"),
    "updates_3": corrected(updates=3),
    "rank_8": corrected(lora_rank=8),
    "times_logit_normal": corrected(time_distribution="logit_normal"),
    "share_eighth": corrected(share=0.125),
    "rate_double": corrected(learning_rate=1e-3),
}


def get_config():
    config = DIGITS["get_config"]()
    config.title = "Digits: the choices of a correction"
    config.evaluation.metrics = ("precision_recall", "diversity")
    config.compare.kinds = ()
    config.compare.variants = VARIANTS
    config.compare.budget = "steps"
    config.compare.amounts = (0.4,)
    return config
