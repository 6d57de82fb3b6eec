"""A Stable Diffusion pipeline with small networks of random weights, for trials.

python examples/write_tiny_sd.py runs/tiny_sd_teacher

It has the files of the real one, and their format, so that whatever reads the one reads
the other: configs/tiny_sd.py here, `StableDiffusionPipeline` of diffusers in PyTorch.
It needs the Flax classes of boot_jax[diffusers], whose VAE has the encoder that
distillation can do without.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import safetensors.numpy
from diffusers.models.vae_flax import FlaxAutoencoderKL
from tokenizers.pre_tokenizers import ByteLevel

from boot_jax.models.clip import CLIPTextEncoder
from boot_jax.models.text_unet import TextUNet
from boot_jax.models.weights import to_diffusers

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = sorted(ByteLevel.alphabet())
VOCABULARY = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), START, END]

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
    "use_linear_projection": True,
}
TEXT_ENCODER = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "bos_token_id": VOCABULARY.index(START),
    "eos_token_id": VOCABULARY.index(END),
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
TOKENIZER = {
    "bos_token": START,
    "eos_token": END,
    "unk_token": END,
    "pad_token": END,
    "model_max_length": 77,
}
PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel", UNET),
    "vae": ("diffusers", "AutoencoderKL", VAE),
    "text_encoder": ("transformers", "CLIPTextModel", TEXT_ENCODER),
    "tokenizer": ("transformers", "CLIPTokenizer", TOKENIZER),
    "scheduler": ("diffusers", "DDIMScheduler", SCHEDULER),
}
FILES = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}


def main(folder):
    for name, (_, class_name, config) in PARTS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        file = FILES.get(name, "config.json")
        write(folder / name / file, {"_class_name": class_name} | config)
    index = {name: [library, kind] for name, (library, kind, _) in PARTS.items()}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    index = {"_class_name": "StableDiffusionPipeline"} | index
    write(folder / "model_index.json", index)
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    write(folder / "tokenizer" / "vocab.json", ids)
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    shapes = {
        "unet": unet_shapes(),
        "text_encoder": text_encoder_shapes(),
        "vae": jax.eval_shape(FlaxAutoencoderKL(**VAE).init_weights, jax.random.key(0)),
    }
    random = np.random.default_rng(0)
    for name, tree in shapes.items():
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: weight(random, path[-1].key, leaf.shape), tree
        )
        file = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        path = folder / name / f"{file}.safetensors"
        tensors = to_diffusers(params)
        safetensors.numpy.save_file(tensors, str(path), {"format": "pt"})


def unet_shapes():
    unet = TextUNet.from_config(UNET)
    x, time = np.zeros((1, 8, 8, 4), np.float32), np.zeros(1, np.float32)
    text = {"text": np.zeros((1, 77, 32), np.float32)}
    return jax.eval_shape(unet.init, jax.random.key(0), x, time, text)["params"]


def text_encoder_shapes():
    encoder = CLIPTextEncoder.from_config(TEXT_ENCODER)
    tokens = np.zeros((1, 77), np.int32)
    return jax.eval_shape(encoder.init, jax.random.key(0), tokens)["params"]


def weight(random, name, shape):
    """Random, at a size that keeps what passes through at its size."""
    if name in ("bias", "scale"):
        return np.full(shape, float(name == "scale"), np.float32)
    fan_in = np.prod(shape[:-1]) if name == "kernel" else 1
    return random.normal(0, fan_in**-0.5, shape).astype(np.float32)


def write(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/write_tiny_sd.py FOLDER")
    main(pathlib.Path(sys.argv[1]))
