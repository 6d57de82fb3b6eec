"""The distillation step at the size of Stable Diffusion: its memory and its time.

python benchmarks/stable_diffusion_step.py --model=sd15 --compile_only
python benchmarks/stable_diffusion_step.py --model=sd15 --batch_size=16 --microbatches=4
python benchmarks/stable_diffusion_step.py --batch_size=16 --correction=lora

Networks of random weights. With --compile_only nothing is allocated but the program.
"""

import argparse
import dataclasses
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from prompts import write_tokenizer

from boot_jax import Objective, Teacher, as_sampled, create_student, get_schedule
from boot_jax.auxiliary import create_auxiliary
from boot_jax.conditions import Conditions, prompt_encoder
from boot_jax.guidance import NEGATIVE_KEY
from boot_jax.models.clip import CLIPTextEncoder
from boot_jax.models.lora import init_adapters
from boot_jax.models.text_unet import TextUNet
from boot_jax.objectives import Correction
from boot_jax.prompts import PromptCache, prompt_batches
from boot_jax.teachers.base import TextEncoder, network_denoiser
from boot_jax.tokenizers import ClipTokenizer, Tokens
from boot_jax.training.correction import corrected_loss
from boot_jax.training.distillation import distillation_loss
from boot_jax.training.state import TrainState, create_optimizer, create_state
from boot_jax.training.step import make_train_step

STARTER = pathlib.Path(__file__).parents[1] / "configs" / "prompts" / "starter.txt"
SCHEDULE = get_schedule(
    "discrete", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
)

CORRECTIONS = {
    "off": Correction(),
    "full": Correction(strength=0.1),
    "lora": Correction(strength=0.1, lora_rank=16),
}

# The published configs, where they differ from the classes' defaults.
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_SDXL_BLOCKS = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "sd15": ({"sample_size": 64, "cross_attention_dim": 768}, _CLIP_L, "epsilon"),
    "sd21": (
        {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
            "hidden_act": "gelu",
        },
        "v_prediction",
    ),
    "sdxl": (
        {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": _SDXL_BLOCKS,
            "up_block_types": [
                block.replace("Down", "Up") for block in reversed(_SDXL_BLOCKS)
            ],
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        _CLIP_L,
        "epsilon",
    ),
}


@dataclasses.dataclass(frozen=True)
class AbstractTokenizer:
    """Only the shape of what a tokenizer gives."""

    row_shape: tuple[int, ...] = (77,)
    vocabulary_size: int = 49408
    fingerprint: str = "abstract"

    def __call__(self, prompts: Any) -> Tokens:
        """Zeros."""
        return Tokens(np.zeros((len(prompts), 77), np.int32), np.zeros(len(prompts)))


def teacher_of(name: str, attention: str | None) -> Teacher:
    """A teacher whose parameters, in bfloat16, are shapes alone."""
    unet_config, clip_config, prediction_type = MODELS[name]
    options = {
        "dtype": jnp.bfloat16,
        "remat": "nothing_saveable",
        "attention_implementation": attention,
    }
    unet = TextUNet.from_config({"in_channels": 4, **unet_config}, **options)
    clip = CLIPTextEncoder.from_config(clip_config, dtype=jnp.bfloat16)
    wide = unet_config["cross_attention_dim"]

    def encode(params: Any, tokens: Array) -> dict[str, Array]:
        found: Any = clip.apply({"params": params}, tokens)
        text = found.last_hidden_state
        if name != "sdxl":
            return {"text": text}
        # The second encoder, three times as wide, is left out: its place is filled.
        text = jnp.pad(text, ((0, 0), (0, 0), (0, wide - text.shape[-1])))
        numbers = jnp.full((len(tokens), 6), 1024.0)
        return {"text": text, "pooled": text[:, 0, :1280], "time_ids": numbers}

    tokens = jnp.zeros((1, 77), jnp.int32)
    clip_params = abstract(lambda key: clip.init(key, tokens)["params"])
    size = unet_config["sample_size"]
    x = jnp.zeros((1, size, size, 4))
    condition = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(encode, clip_params, tokens),
    )
    return Teacher(
        denoise=network_denoiser(unet, SCHEDULE, prediction_type),
        params=abstract(
            lambda key: unet.init(key, x, jnp.zeros(1), condition)["params"]
        ),
        schedule=SCHEDULE,
        sample_shape=(size, size, 4),
        network=unet,
        prediction_type=prediction_type,
        text=TextEncoder(
            tokenizer=AbstractTokenizer(), encode=encode, params=clip_params
        ),
    )


def abstract(init: Any) -> Any:
    """The shapes of parameters, in bfloat16."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf.update(dtype=jnp.bfloat16), shapes)


def training(
    name: str,
    batch_size: int,
    microbatches: int = 1,
    attention: str | None = None,
    correction: str = "off",
) -> tuple[Any, tuple[Any, ...]]:
    """The step of the distillation, and its arguments as shapes."""
    teacher = teacher_of(name, attention)
    text = teacher.text
    assert text is not None
    student = create_student(teacher)
    optimizer = create_optimizer(learning_rate=1e-5, num_steps=10**6)
    shared: dict[str, Any] = {
        "signal": student.signal,
        "denoise": as_sampled(
            teacher.denoise, null_condition=NEGATIVE_KEY, guidance_scale=7.5
        ),
        "schedule": SCHEDULE,
        "objective": Objective(
            solver="ddim", boundary_share=1.0, correction=CORRECTIONS[correction]
        ),
        "encode": prompt_encoder(text, ""),
    }
    loss = distillation_loss(
        conditions=Conditions(),
        sample_shape=teacher.sample_shape,
        batch_size=batch_size,
        **shared,
    )
    rank = CORRECTIONS[correction].lora_rank
    if correction != "off":
        second = create_auxiliary(teacher, lora_rank=rank)
        loss = corrected_loss(loss, network=second, **shared)
    step = make_train_step(
        loss, optimizer, ema_decay=0.9999, num_steps=10**6, microbatches=microbatches
    )

    def state(key: Array) -> TrainState:
        tokens = jnp.zeros((1, 77), jnp.int32)
        condition = jax.eval_shape(text.encode, text.params, tokens)
        condition = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), condition)
        network: Any = student.network
        x, time = jnp.zeros((1, *teacher.sample_shape)), jnp.zeros(1)
        added = {"target_time": time}
        params = network.init(key, x, time, condition, added)["params"]
        if loss.auxiliary is None:
            return create_state(params, optimizer)
        own = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), teacher.params)
        if rank:
            own = {"adapters": init_adapters(own, key, rank), "added": {}}
        return create_state(params, optimizer, loss.auxiliary.state_of(own))

    frozen = {"teacher": teacher.params, "text": text.params}
    batch = {"tokens": jax.ShapeDtypeStruct((1, batch_size, 77), jnp.int32)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    return step, (jax.eval_shape(state, jax.random.key(0)), frozen, batch, key)


def report_memory(compiled: Any) -> None:
    """Prints what the compiled step holds on a device."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes
    print(f"held between steps   {held / 1e9:8.2f} GB a device")
    print(f"while a step runs    {memory.temp_size_in_bytes / 1e9:8.2f} GB more")


def random_like(tree: Any) -> Any:
    """Small numbers in the shapes of a tree, made on the device."""

    @jax.jit
    def make() -> Any:
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e-3, leaf.dtype), tree)

    return make()


def main(
    model: str,
    batch_size: int,
    microbatches: int,
    attention: str | None,
    correction: str,
    steps: int,
    compile_only: bool,
) -> None:
    """Compiles a step, says what memory it takes, and times it beside the prompts."""
    step, arguments = training(model, batch_size, microbatches, attention, correction)
    state, frozen, *_ = arguments
    count = sum(leaf.size for leaf in jax.tree.leaves(frozen["teacher"]))
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"{model}, {count:,} parameters, batch {batch_size}, {device}")
    print(f"correction           {correction:>8}")
    start = time.perf_counter()
    compiled = step.lower(*arguments).compile()
    print(f"compiled in          {time.perf_counter() - start:8.1f} s")
    report_memory(compiled)
    if compile_only:
        return
    state, frozen = random_like(state), random_like(frozen)
    waited = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        tokenizer = ClipTokenizer.from_folder(
            write_tokenizer(folder / "tokenizer", STARTER)
        )
        cache = PromptCache.open(STARTER, tokenizer, folder / "cache")
        batches = prompt_batches(cache, batch_size, seed=0)
        key = jax.random.key(1)
        state, _ = compiled(state, frozen, next(batches), key)
        jax.block_until_ready(state)
        start = time.perf_counter()
        for _ in range(steps):
            before = time.perf_counter()
            batch = next(batches)
            waited.append(time.perf_counter() - before)
            state, _ = compiled(state, frozen, batch, key)
        jax.block_until_ready(state)
        seconds = (time.perf_counter() - start) / steps
        batches.close()
    print(f"a step takes         {seconds:8.3f} s, {batch_size / seconds:.1f} images/s")
    print(f"it waits for prompts {np.median(waited) * 1e6:8.0f} us of that")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--attention", choices=("xla", "cudnn"))
    parser.add_argument("--correction", choices=CORRECTIONS, default="off")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile_only", action="store_true")
    main(**vars(parser.parse_args()))
