"""The model card: what the student is, how each form is used, what it is worth."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax

from boot_jax.evaluation.report import summary_table
from boot_jax.export.finished import FinishedStudent
from boot_jax.export.folding import StockModel
from boot_jax.objectives import Objective
from boot_jax.teachers.folder import Component, locate, read_components

#: Front-matter fields that say under which terms a model may be used.
_LICENCE_FIELDS = ("license", "license_name", "license_link")

# How a student of each kind was made, and from which paper.
_METHODS = {
    "boot": "bootstrapping along the teacher's ODE (Gu et al., 2306.05544)",
    "continuous": "bootstrapping along the teacher's ODE (Gu et al., 2306.05544)",
    "pid": "physics-informed distillation (Tee et al., 2411.08378)",
    "direct": "regression on the teacher's samples (Luhman and Luhman, 2101.02388)",
    "progressive": "progressive distillation (Salimans and Ho, 2202.00512)",
    "consistency": "consistency distillation (Song et al., 2303.01469)",
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Whose student it is.

    Attributes:
      description: the teacher in a few words, such as its folder or hub id.
      fingerprint: of its parameters.
      licence: the licence fields of its card, as they are written there.
      parts: of its pipeline, by name; none if it is no pipeline in diffusers format.
    """

    description: str
    fingerprint: str
    licence: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parts: Mapping[str, Component] = dataclasses.field(default_factory=dict)


def origin_of(config: Any, workdir: pathlib.Path, fingerprint: str) -> Origin:
    """The teacher of a run; licence and parts are looked for in its folder."""
    teacher = config.teacher
    if teacher.source == "mixture":
        return Origin("an exact Gaussian mixture", fingerprint)
    if teacher.source == "train":
        description = f"a {config.network.name} trained on `{config.data.name}`"
        return Origin(description, fingerprint, read_licence(workdir / "teacher"))
    description, folder, parts = f"`{teacher.path}`", pathlib.Path(teacher.path), {}
    if teacher.source in ("diffusers", "flax_pipeline"):
        folder = locate(teacher.path, teacher.revision)
        parts = read_components(folder)
        description += f" at revision {teacher.revision}" if teacher.revision else ""
    return Origin(description, fingerprint, read_licence(folder), parts)


def read_licence(folder: pathlib.Path) -> dict[str, str]:
    """The licence fields of the model card in a folder; none if it has no card."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    lines = re.findall(r"^(\w+):[ \t]*(\S.*?)[ \t]*$", head[1] if head else "", re.M)
    return {name: value for name, value in lines if name in _LICENCE_FIELDS}


def model_card(
    finished: FinishedStudent,
    *,
    config: Any,
    results: Mapping[str, Any] | None,
    origin: Origin,
    stock: StockModel | None,
    why_no_stock: str = "",
    why_no_artifact: str = "",
) -> str:
    """The text of README.md, with the front matter that hubs read."""
    parts = [
        _front_matter(origin, stock),
        f"# {config.title}: a one-step student",
        "This network makes an image from noise in **one** call. It was distilled "
        f"from {origin.description} (fingerprint `{origin.fingerprint}`) by boot_jax, "
        + _method(finished.objective),
        _facts(finished, config),
        "## Use",
        _use_diffusers(finished, stock, why_no_stock),
        _use_artifact(finished, why_no_artifact),
        _rounding(config),
        "The parameters alone (moving average) are in `jax/ema_params.safetensors`, "
        "under the names of boot_jax's network; `jax/config.json` is the run's config.",
        "## What it is worth",
        _figures(results),
        "## Limits",
        _steps(finished.objective),
        "## Licence",
        _licence(origin),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _method(objective: Objective) -> str:
    words, number = _METHODS[objective.kind].removesuffix(")").rsplit(" ", 1)
    data = "with" if objective.needs_images else "without"
    said = f"{data} training data, by {words} {_arxiv(number)})"
    if objective.correction.strength:
        said += (
            ", and a correction of its samples' distribution (as in Diff-Instruct, Luo "
            f"et al., {_arxiv('2305.18455')})"
        )
    return f"{said}."


def _arxiv(number: str) -> str:
    return f"[arXiv {number}](https://arxiv.org/abs/{number})"


def _steps(objective: Objective) -> str:
    if objective.start_times:
        said = (
            "Here it makes one step. It has also learned to go on from a sample half "
            "way, of which boot_jax makes use (`sample.steps`)"
        )
    else:
        said = (
            "More steps do not help: the network no longer knows a time, and has "
            "learned the way from pure noise only"
        )
    return (
        f"{said}. It inherits what its teacher cannot draw, and loses some of its "
        "variety."
    )


def _front_matter(origin: Origin, stock: StockModel | None) -> str:
    lines = [f"{name}: {value}" for name, value in origin.licence.items()]
    lines.append(f"library_name: {'jax' if stock is None else 'diffusers'}")
    lines += ["tags:", "- one-step", "- distillation", "- boot_jax"]
    return "\n".join(["---", *lines, "---"])


def _facts(finished: FinishedStudent, config: Any) -> str:
    objective, teacher = finished.objective, config.teacher
    count = sum(leaf.size for leaf in jax.tree.leaves(finished.params))
    height, width, channels = finished.sample_shape
    schedule = type(finished.teacher.schedule).__name__
    guidance = f"{teacher.guidance_scale:g}"
    if finished.guidance_scale is not None:
        low, high = teacher.guidance_range
        guidance = (
            f"{finished.guidance_scale:g} (it was trained on {low:g} to {high:g})"
        )
    rows = {
        "latent" if finished.is_latent else "image": f"{height} x {width} x {channels}",
        "classes": finished.num_classes or "none",
        "network": f"{type(finished.network).__name__}, {count:,} parameters",
        "teacher's schedule and prediction": f"{schedule}, "
        f"{finished.student.prediction_type}",
        "teacher's guidance scale": guidance,
        "objective": f"{objective.kind}, from t = {objective.t_max:g} to "
        f"{objective.t_min:g}",
        "strength of the correction": f"{objective.correction.strength:g}",
        "training": f"{config.distill.num_steps:,} steps of "
        f"{config.distill.batch_size} noises, seed {config.seed}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _use_diffusers(
    finished: FinishedStudent, stock: StockModel | None, why_not: str
) -> str:
    if stock is None:
        return f"Not with PyTorch diffusers: {why_not}."
    if stock.pipeline is not None:
        options, remark = "num_inference_steps=1", ""
        if finished.teacher.text is not None:
            options = f'"a small house by a river", {options}'
            remark = (
                " A guidance scale or a negative prompt changes nothing: the student "
                "has learned its teacher's guidance."
            )
        elif finished.num_classes is not None:
            options = f"class_labels=[0], guidance_scale=1, {options}"
        return f"""With PyTorch diffusers, unmodified (`FOLDER` is this one):

```python
from diffusers import {stock.pipeline}

pipeline = {stock.pipeline}.from_pretrained("FOLDER")
image = pipeline({options}).images[0]
```

`num_inference_steps=1` is needed; the default number of steps is refused.{remark}"""
    call = "batch_size=4"
    if finished.num_classes is not None:
        call = f"class_labels=[0, {finished.num_classes - 1}]"
    return f"""With PyTorch diffusers (`FOLDER` is this one). No stock pipeline runs
such a network alone, so its pipeline is the file `pipeline.py` here: read it, then

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(
    "FOLDER", custom_pipeline="FOLDER", trust_remote_code=True
)
images = pipeline({call}).images
```"""


def _use_artifact(finished: FinishedStudent, why_not: str) -> str:
    if why_not:
        return f"Not as one file for jax alone: {why_not}."
    height, width, channels = finished.sample_shape
    label, made, what = "", "images", "They have values in [-1, 1], in NHWC."
    if finished.is_latent:
        made, what = "latents", "They are for the teacher's VAE to decode, in NHWC."
    if finished.num_classes is not None:
        label = ", np.zeros(8, np.int32)"
    elif finished.teacher.text is not None:
        shape = (8, *finished.teacher.text.tokenizer.row_shape)
        label = f", np.zeros({shape}, np.int32)"
        what += (
            " The second argument holds the prompts' tokens, as the teacher's "
            "tokenizer gives them; the zeros only show its shape."
        )
    return f"""With jax alone, on CPU, CUDA or TPU, for any batch size:

```python
import jax.export
import numpy as np

with open("FOLDER/jax/student.jax_export", "rb") as file:
    student = jax.export.deserialize(bytearray(file.read()))
noise = np.random.standard_normal((8, {height}, {width}, {channels})).astype(np.float32)
{made} = student.call(noise{label})
```

{what} It needs the package `flatbuffers`."""


def _rounding(config: Any) -> str:
    dtype = config.network.dtype
    if dtype == "float32":
        return ""
    return (
        f"The one file computes in {dtype}, as boot_jax does, and PyTorch in float32: "
        f"their images agree as far as {dtype} goes."
    )


def _figures(results: Mapping[str, Any] | None) -> str:
    if results is None:
        return "It has not been evaluated: `--mode=evaluate` before `--mode=export`."
    return (
        f"Measured by `--mode=evaluate` on {results['num_images']} images, features "
        f"{results['features']}, against {results['data']}:\n\n"
        f"```\n{summary_table(results)}\n```"
    )


def _licence(origin: Origin) -> str:
    if origin.licence:
        terms = ", ".join(f"{name} {value}" for name, value in origin.licence.items())
        return f"Inherited from the teacher's card: {terms}."
    return (
        "The teacher came without a model card, so no licence is stated; whoever "
        "publishes this student must find out what the teacher's terms allow."
    )
