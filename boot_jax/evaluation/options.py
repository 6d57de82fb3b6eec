"""Whether a config's ``evaluation`` can be done, before anything is computed."""

from typing import Any

from boot_jax.config import ConfigError, unknown
from boot_jax.evaluation.features import FEATURES
from boot_jax.evaluation.inception_features import MISSING
from boot_jax.evaluation.resizing import RESIZE_MODES
from boot_jax.evaluation.scores import METRICS, OF_INCEPTION


def check_options(config: Any) -> None:
    """Checks the section's choices among each other.

    Raises:
      ConfigError: the first thing that is wrong, in one line.
    """
    options = config.evaluation
    if options.features not in FEATURES:
        raise ConfigError(unknown("evaluation.features", options.features, FEATURES))
    if options.resize not in RESIZE_MODES:
        raise ConfigError(unknown("evaluation.resize", options.resize, RESIZE_MODES))
    for name in options.metrics:
        if name not in METRICS:
            raise ConfigError(unknown("evaluation.metrics", name, METRICS))
        if name in OF_INCEPTION and options.features != "inception":
            raise ConfigError(
                f"evaluation.metrics has {name!r}, which needs "
                "evaluation.features='inception' and its weights"
            )
    if options.features == "inception" and not options.weights:
        raise ConfigError(f"evaluation.weights is empty; {MISSING}")
    for name in ("bootstrap", "kernel_subset_size", "nearest_images"):
        if options[name] < 0:
            raise ConfigError(
                f"evaluation.{name} is {options[name]}, but must be positive, or 0"
            )
    is_split = "inception_score" in options.metrics
    if is_split and not 1 <= options.inception_splits <= options.num_images:
        raise ConfigError(
            f"evaluation.inception_splits is {options.inception_splits}, but must lie "
            f"between 1 and evaluation.num_images = {options.num_images}"
        )
    if "lpips" in options.metrics and not options.lpips_weights:
        raise ConfigError(
            "evaluation.metrics has 'lpips', but evaluation.lpips_weights is empty; "
            "save lpips.LPIPS(net='vgg').state_dict() of the package lpips as "
            "safetensors, and name the file"
        )
    if "clip_score" in options.metrics and not options.clip:
        raise ConfigError(
            "evaluation.metrics has 'clip_score', but evaluation.clip is empty; name a "
            "folder of a CLIP model, such as a download of openai/clip-vit-base-patch16"
        )
