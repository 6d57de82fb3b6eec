"""Images of a student: grids, interpolations and sweeps, also while it is trained."""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from boot_jax import distributed, sampling, summary
from boot_jax.conditions import prompt_encoder
from boot_jax.config import ConfigError
from boot_jax.evaluation.paired import Pair, student_name
from boot_jax.prompted import between_prompts
from boot_jax.prompts import read_prompts
from boot_jax.run import Run
from boot_jax.tokenizers import WordTokenizer
from boot_jax.trained import (
    encoder,
    negative_prompt,
    pair_of,
    require_student,
    trained_pair,
)

#: The teacher's rows in the grids of a training.
TEACHER_STEPS = (50, 8)


def sample(run: Run) -> pathlib.Path:
    """Writes images of the student: one grid, and each alone.

    Image ``i`` of a seed is the same whatever the batch size or the number of devices.
    With ``sample.interpolate_to`` they lie on the great circle between image 0 of
    either seed, with ``sample.prompt_to`` on the line between two prompts, and with
    ``sample.same_noise`` all come from one noise: then there is an animation, too.

    Returns:
      The folder, under ``samples`` in the workdir.

    Raises:
      CheckpointError: there is no student.
      ConfigError: the options do not go with it.
      PromptError: prompts cannot be read.
    """
    require_student(run)
    options, prompts = run.config.sample, _prompts(run)
    _check(run, prompts)
    pair = trained_pair(run, prompts)
    noise, condition = pair.noise(options.seed), pair.condition
    if options.interpolate_to >= 0:
        noise = _great_circle(pair, options)
    elif _holds_noise(options):
        noise = _held(noise)
    if options.prompt_to:
        pair, condition = _between_prompts(run, pair)
    elif options.interpolate_to >= 0:
        condition = _held(condition)  # between two seeds everything else is held

    def images_of(generator: sampling.Generator) -> np.ndarray:
        labelled = functools.partial(condition, label=options.label)
        return _images(run, generator, noise, labelled, options.num, options.batch_size)

    images = images_of(pair.student(options.steps, options.renoise))
    beside = {
        f"teacher, {steps} steps": images_of(pair.sampler(steps))
        for steps in options.teacher_steps
    }
    folder = run.workdir / "samples" / _name(run, prompts)

    def write() -> None:
        summary.save_images(folder, images)
        if beside:
            rows = {**beside, student_name(options.steps): images}
            summary.save_grid(folder / "beside_teacher.png", rows)
        if prompts is not None:
            told = itertools.islice(itertools.cycle(prompts), options.num)
            lines = [f"{index:05d} {prompt}\n" for index, prompt in enumerate(told)]
            (folder / "prompts.txt").write_text("".join(lines), encoding="utf-8")
        if options.interpolate_to >= 0 or _holds_noise(options):
            summary.save_animation(folder / "animation.gif", images)

    distributed.on_main(write)
    return folder


def _images(
    run: Run,
    generator: sampling.Generator,
    noise: Callable[[np.ndarray], Array],
    condition: Callable[[np.ndarray], Any],
    num: int,
    batch_size: int,
) -> np.ndarray:
    """Generated, and decoded where samples are something else."""
    made = sampling.generate(generator, noise, condition, num, batch_size, run.mesh)
    return sampling.to_images(run.teacher.decoder, made.images, batch_size)


def _first_prompts(run: Run, num: int) -> list[str]:
    """Of those that the run learns from, as many as there are."""
    assert run.prompts is not None
    cache = run.prompts.cache
    return [cache.text(index) for index in range(min(num, len(cache)))]


def _prompts(run: Run) -> list[str] | None:
    """The prompts to show, in turn; None where the teacher takes none."""
    options = run.config.sample
    if run.teacher.text is None:
        return None
    if options.prompt:
        prompts = [options.prompt]
    elif options.prompts:
        read = read_prompts(options.prompts, column=run.config.prompts.column)
        prompts = [prompt.text for prompt in itertools.islice(read, options.num)]
    else:
        prompts = _first_prompts(run, options.num)
    _warn_of_strange(run, prompts)
    return prompts


def _warn_of_strange(run: Run, prompts: list[str]) -> None:
    """Names what will not be read as it is meant."""
    assert run.teacher.text is not None
    tokenizer = run.teacher.text.tokenizer
    if isinstance(tokenizer, WordTokenizer):
        unknown = tokenizer.unknown_words(prompts)
        if unknown:
            print(
                f"warning: the teacher never read {', '.join(list(unknown)[:5])}; it "
                f"knows {len(tokenizer.vocabulary)} words",
                file=sys.stderr,
            )
    cut = int(np.sum(tokenizer(prompts).truncated))
    if cut:
        print(f"warning: {cut} of the prompts are too long, and cut", file=sys.stderr)


def _check(run: Run, prompts: list[str] | None) -> None:
    options = run.config.sample
    asked = [
        name
        for name in ("prompt", "prompts", "prompt_to", "negative_prompt")
        if options[name]
    ]
    if prompts is None and asked:
        raise ConfigError(
            f"sample.{asked[0]} is set, but this student takes no prompts; leave it "
            "empty"
        )
    if options.prompt_to and not options.prompt:
        raise ConfigError("sample.prompt_to needs a prompt to begin at: sample.prompt")
    if options.negative_prompt and not options.teacher_steps:
        raise ConfigError(
            "sample.negative_prompt is for the teacher's samples, since the student "
            f"has learned its own ({run.config.prompts.negative!r}); say how many "
            "steps those take with sample.teacher_steps, such as (50,)"
        )


def _holds_noise(options: Any) -> bool:
    return options.same_noise or (options.prompt_to and options.interpolate_to < 0)


def _held(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of image indices, always at the first image."""
    return lambda indices, **rest: function(np.zeros_like(indices), **rest)


def _between_prompts(run: Run, pair: Pair) -> tuple[Pair, Callable[..., Any]]:
    options, text = run.config.sample, run.teacher.text
    assert text is not None
    if isinstance(text.tokenizer, WordTokenizer):
        raise ConfigError(
            "sample.prompt_to needs embeddings to go between, but this network reads "
            "words itself; leave it empty"
        )
    encode = between_prompts(prompt_encoder(text, negative_prompt(run)))
    other = np.asarray(text.tokenizer([options.prompt_to]).ids)
    steps = max(options.num - 1, 1)

    def condition(indices: np.ndarray, label: int) -> dict[str, np.ndarray]:
        return pair.condition(indices, label) | {
            "other_tokens": np.repeat(other, len(indices), axis=0),
            "weight": (indices / steps).astype(np.float32),
        }

    return dataclasses.replace(pair, encode=encoder(run, encode)), condition


def _great_circle(pair: Pair, options: Any) -> Callable[[np.ndarray], Array]:
    """Noise from image 0 of one seed to image 0 of the other, by image index."""
    first = np.zeros(1, int)
    start, end = (
        pair.noise(seed)(first)[0] for seed in (options.seed, options.interpolate_to)
    )
    steps = max(options.num - 1, 1)
    return lambda indices: sampling.slerp(
        start, end, jnp.asarray(indices / steps, jnp.float32)
    )


def _name(run: Run, prompts: list[str] | None) -> str:
    """Of the folder: all that decides the images."""
    options, name = run.config.sample, f"seed_{run.config.sample.seed}"
    if options.label >= 0:
        name += f"_label_{options.label}"
    if run.guidance_range:
        name += f"_guidance_{options.guidance_scale:g}"
    if prompts is not None and (options.prompt or options.prompts):
        told = "\n".join([*prompts, options.prompt_to])
        name += f"_prompts_{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    if options.steps > 1:
        name += f"_steps_{options.steps}_{options.renoise}"
    if options.same_noise:
        name += "_same_noise"
    if options.interpolate_to >= 0:
        name += f"_to_{options.interpolate_to}"
    return name


class TrainingGrids:
    """Grids of fixed noises and prompts during a training, beside the teacher's.

    Args:
      run: whose; ``run.sample_images`` says how many.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._num = run.config.run.sample_images
        told = None if run.prompts is None else _first_prompts(run, self._num)
        self._pair = pair_of(run, None, told)  # the student is given at each call
        self._teacher: dict[str, np.ndarray] = {}

    def __call__(self, step: int, params: Any) -> None:
        """Writes ``samples/step_NNNNNNNN.png`` in the workdir.

        Args:
          step: its number.
          params: of the student, on the mesh.
        """
        pair = dataclasses.replace(self._pair, params=params)
        if not self._teacher:
            self._teacher = {
                f"teacher, {steps} steps": self._images(pair, pair.sampler(steps))
                for steps in TEACHER_STEPS
            }
        rows = {**self._teacher, "student, 1 step": self._images(pair, pair.student())}
        path = self._run.workdir / "samples" / f"step_{step:08d}.png"
        distributed.on_main(lambda: summary.save_grid(path, rows))

    def _images(self, pair: Pair, generator: sampling.Generator) -> np.ndarray:
        noise = pair.noise(self._run.config.sample.seed)
        return _images(
            self._run, generator, noise, pair.condition, self._num, self._num
        )
