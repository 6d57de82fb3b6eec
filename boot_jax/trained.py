"""A student and its teacher, ready to be called: of a checkpoint, or in training."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from boot_jax.conditions import Encode, prompt_encoder
from boot_jax.evaluation.paired import Pair
from boot_jax.run import Run
from boot_jax.training.checkpoints import CheckpointError, Checkpoints
from boot_jax.training.logs import record
from boot_jax.training.run import state_template


def trained_pair(run: Run, prompts: Sequence[str] | None = None) -> Pair:
    """The student of the newest checkpoint, and its teacher.

    Args:
      run: whose.
      prompts: for images in turn; None for those that the run learns from.

    Raises:
      CheckpointError: there is none, or it is of another run.
    """
    require_student(run)
    checkpoints = Checkpoints(
        run.workdir / "checkpoints",
        run.metadata,
        force=run.config.run.force,
        record=functools.partial(record, run.workdir),
    )
    template = state_template(
        run.student.init,
        run.config.distill,
        run.mesh,
        run.config.mesh,
        run.loss(None).auxiliary,
    )
    state = checkpoints.restore(template)
    checkpoints.close()
    return pair_of(run, state.ema_params, prompts)


def require_student(run: Run) -> None:
    """Refuses a workdir without a student, before its teacher is looked at.

    Raises:
      CheckpointError: there is none.
    """
    if not (run.workdir / "checkpoints").is_dir():
        raise CheckpointError(
            f"there is no student in {run.workdir}; train one with --mode=distill"
        )


def pair_of(run: Run, params: Any, prompts: Sequence[str] | None = None) -> Pair:
    """A student of some parameters, and its teacher; see `trained_pair`."""
    text = run.teacher.text
    tokens, encode = None, lambda condition: condition
    if text is not None:
        tokens = _tokens(run, prompts)
        encode = encoder(run, prompt_encoder(text, negative_prompt(run)))
    return Pair(
        signal=run.student.signal,
        params=params,
        denoise=run.denoise,
        teacher=run.placed_teacher,
        objective=run.objective,
        guidance_scale=run.config.sample.guidance_scale if run.guidance_range else None,
        tokens=tokens,
        encode=encode,
        jump=run.student.jump,
    )


def negative_prompt(run: Run) -> str | None:
    """Of the teacher's unconditional half; None where it has none."""
    config = run.config
    chosen = config.sample.negative_prompt or config.prompts.negative
    return chosen if run.is_guided else None


def encoder(run: Run, encode: Encode) -> Callable[[Any], Any]:
    """An encoder of conditions, compiled, with the teacher's parameters on the mesh."""
    return functools.partial(jax.jit(encode), run.placed_text.params)


def _tokens(run: Run, prompts: Sequence[str] | None) -> np.ndarray:
    text = run.teacher.text
    assert text is not None
    if prompts is not None:
        return np.asarray(text.tokenizer(prompts).ids)
    assert run.prompts is not None
    cache = run.prompts.cache
    most = min(len(cache), run.config.evaluation.num_images)
    return cache.take(np.arange(most))["tokens"]
