"""A small CLIP tokenizer's folder, made here: bytes, learned merges, two specials."""

import itertools
import json
import pathlib
from collections import Counter
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

START, END = "<|startoftext|>", "<|endoftext|>"

# What the merges are learned from.
TEXT = (
    "a photograph of an astronaut riding a horse on the moon in the evening light the "
    "small red house stands beside the river under tall trees and it's raining don't "
    "they're painting with watercolour naïve café 1984 2000 portrait of a young woman"
)

# Specials as the folders of Stable Diffusion 1 name them.
SD1 = {
    "bos_token": {"content": START, "lstrip": False, "normalized": True},
    "eos_token": {"content": END, "lstrip": False, "normalized": True},
    "unk_token": {"content": END, "lstrip": False, "normalized": True},
    "pad_token": END,
}
# The second tokenizer of SDXL pads with "!", its token 0.
SDXL_2 = SD1 | {"pad_token": "!"}


def learned_merges(num: int = 120) -> list[tuple[str, str]]:
    """The most frequent pairs of symbols in ``TEXT``, merged one after the other."""
    splitter = ByteLevel(add_prefix_space=False)
    words = []
    for word in TEXT.split():
        symbols = list(splitter.pre_tokenize_str(word)[0][0])
        words.append([*symbols[:-1], symbols[-1] + "</w>"])
    merges = []
    for _ in range(num):
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = [_merged(word, best) for word in words]
        if all(len(word) == 1 for word in words):
            break
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def write_clip_folder(
    folder: pathlib.Path, length: int = 77, special: dict[str, Any] = SD1, **config: Any
) -> pathlib.Path:
    """Writes a ``tokenizer`` folder; ``config`` goes into ``tokenizer_config.json``."""
    folder.mkdir(parents=True)
    # "!" comes first, as in CLIP's own vocabulary.
    symbols = sorted(ByteLevel.alphabet())
    merges = learned_merges()
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    tokens += ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    fields = {
        "model_max_length": length,
        "tokenizer_class": "CLIPTokenizer",
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        **{
            name: {"__type": "AddedToken", **token}
            if isinstance(token, dict)
            else token
            for name, token in special.items()
        },
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def write_clip_model(folder: pathlib.Path, vision: dict[str, Any]) -> pathlib.Path:
    """Writes a ``CLIPModel`` with random weights and the tokenizer above.

    Args:
      folder: made here.
      vision: of a ``CLIPVisionConfig``; the text encoder is of the same size.
    """
    import stable_diffusion
    import torch
    from transformers import CLIPConfig, CLIPModel

    write_clip_folder(folder, length=16)
    size = len(json.loads((folder / "vocab.json").read_text()))
    text = {k: v for k, v in vision.items() if k not in ("image_size", "patch_size")}
    text |= {"vocab_size": size, "max_position_embeddings": 16}
    text |= {"bos_token_id": size - 2, "eos_token_id": size - 1}
    text |= {"pad_token_id": size - 1}
    dim = vision["projection_dim"]
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim)
    model = stable_diffusion.randomised(CLIPModel(config))
    with torch.no_grad():
        model.text_model.embeddings.token_embedding.weight.normal_()
    model.save_pretrained(folder)
    return folder
