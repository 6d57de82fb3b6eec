"""How fast prompts become tokens, and how long the host takes for a batch of them.

python benchmarks/prompts.py --num_prompts=100000 --step_seconds=0.05
"""

import argparse
import itertools
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from boot_jax.prompts import PromptCache, prompt_batches
from boot_jax.tokenizers import ClipTokenizer

GRAMMAR = pathlib.Path(__file__).parents[1] / "configs" / "prompts" / "grammar.py"
SPECIALS = ["<|startoftext|>", "<|endoftext|>"]


def write_tokenizer(folder: pathlib.Path, prompts: pathlib.Path) -> pathlib.Path:
    """A folder as CLIP's, with a vocabulary learned from the first prompts."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(
        Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", True
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=49408,
        initial_alphabet=sorted(alphabet),
        end_of_word_suffix="</w>",
        special_tokens=SPECIALS,
        show_progress=False,
    )
    with prompts.open(encoding="utf-8") as file:
        learner.train_from_iterator(itertools.islice(file, 50_000), trainer)
    folder.mkdir()
    learner.model.save(str(folder))
    # CLIP's has every byte also as the end of a word.
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    for byte in sorted(alphabet):
        vocabulary.setdefault(f"{byte}</w>", len(vocabulary))
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return folder


def megabytes() -> float:
    """The most memory that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def waits(
    cache: PromptCache, batch_size: int, k: int, steps: int, step_seconds: float
) -> np.ndarray:
    """Seconds that a loop waits for each item while it works for so long a step."""
    batches = prompt_batches(cache, batch_size, seed=0, steps_per_dispatch=k)
    next(batches)  # draws the permutation of the first epoch
    seconds = []
    for _ in range(steps // k):
        time.sleep(step_seconds * k)
        start = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - start)
    batches.close()
    return np.asarray(seconds)


def main(
    num_prompts: int,
    tokenizer: str,
    batch_size: int,
    k: int,
    steps: int,
    step_seconds: float,
) -> None:
    """Prints speed and memory of building, opening and reading."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        path = folder / "prompts.txt"
        subprocess.run(
            [sys.executable, GRAMMAR, f"--output={path}", f"--num={num_prompts}"],
            check=True,
        )
        clip = ClipTokenizer.from_folder(
            tokenizer or write_tokenizer(folder / "tokenizer", path)
        )
        before = megabytes()
        start = time.perf_counter()
        cache = PromptCache.open(path, clip, folder / "cache")
        building = time.perf_counter() - start
        growth = megabytes() - before
        start = time.perf_counter()
        cache = PromptCache.open(path, clip, folder / "cache")
        opening = time.perf_counter() - start
        size = sum(file.stat().st_size for file in cache.folder.iterdir())
        tokens = cache.take(np.arange(min(len(cache), 1000)))["tokens"]
        used = (tokens != tokens[:, -1:].min()).sum() / len(tokens) + 1
        reading = waits(cache, batch_size, k, steps, 0.0)
        working = waits(cache, batch_size, k, steps, step_seconds)
    row, speed = clip.row_shape[0], len(cache) / building
    print(f"{len(cache)} prompts, {used:.1f} of {row} ids before the padding")
    print(
        f"building   {building:9.2f} s   {speed:,.0f} prompts, {speed * row:,.0f} ids "
        f"a second"
    )
    print(f"           {growth:9.1f} MB more memory, {size / 1e6:.1f} MB on the disk")
    print(f"opening    {opening:9.2f} s   verified")
    print(
        f"a batch    {np.sum(reading) / steps * 1e6:9.1f} us  a step of {batch_size}, "
        f"k = {k}, if nothing else is done"
    )
    if step_seconds:
        share = np.sum(working) / (steps * step_seconds)
        print(
            f"the loop   {np.sum(working) / steps * 1e6:9.1f} us  it waits a step of "
            f"{step_seconds * 1e3:.1f} ms ({share:.2%})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_prompts", type=int, default=100_000)
    parser.add_argument("--tokenizer", default="", help="a pipeline's folder of CLIP's")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--step_seconds", type=float, default=0.0)
    main(**vars(parser.parse_args()))
