"""The starter prompts: that the grammar in the repository made them, and how varied."""

import importlib.util
import pathlib
import re
import subprocess
import sys
from collections import Counter

import numpy as np
from clip_folders import write_clip_folder

from boot_jax.prompts import PromptCache, read_prompts
from boot_jax.tokenizers import ClipTokenizer

FOLDER = pathlib.Path(__file__).parents[1] / "configs" / "prompts"
STARTER = FOLDER / "starter.txt"
LINES = STARTER.read_text(encoding="utf-8").splitlines()


def test_the_file_is_what_the_grammar_makes(tmp_path):
    made = tmp_path / "made.txt"
    subprocess.run(
        [sys.executable, FOLDER / "grammar.py", f"--output={made}"],
        check=True,
        timeout=60,
    )
    assert made.read_bytes() == STARTER.read_bytes(), (
        "run python configs/prompts/grammar.py and commit what it writes"
    )


def test_there_are_more_than_a_thousand_and_all_differ():
    assert len(LINES) > 1000
    assert len({line.casefold() for line in LINES}) == len(LINES)
    assert [prompt.text for prompt in read_prompts(STARTER)] == LINES


def test_they_are_plain_sentences_without_names():
    for line in LINES:
        assert re.fullmatch(r"[A-Za-z0-9,.' -]+", line) and "  " not in line, line
        assert 2 <= len(line.split()) <= 50, line
        # Capitals only where a sentence begins: no artists, persons or trade marks.
        rest = re.sub(r"(^|\. )[A-Z]|3D", "", line)
        assert rest == rest.lower(), line
        # "a" and "an" fit what follows.
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", line, re.IGNORECASE), line


def test_they_are_varied():
    spec = importlib.util.spec_from_file_location("grammar", FOLDER / "grammar.py")
    assert spec is not None and spec.loader is not None
    grammar = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grammar)
    text = "\n".join(LINES).lower()
    # Every phrase of every list is there.
    lists = {
        name: grammar.options(value)
        for name, value in vars(grammar).items()
        if name.isupper() and isinstance(value, str)
    }
    assert len(lists) > 20
    missing = [
        phrase
        for phrases in lists.values()
        for phrase in phrases
        if phrase.lower() not in text
    ]
    assert not missing
    words = Counter(re.findall(r"[a-z-]+", text))
    assert len(words) > 700
    lengths = np.asarray([len(line.split()) for line in LINES])
    assert np.percentile(lengths, 10) <= 10 and np.percentile(lengths, 90) >= 20
    # No opening of three words makes up more than a thirtieth.
    openings = Counter(" ".join(line.split()[:3]) for line in LINES)
    assert openings.most_common(1)[0][1] < len(LINES) / 30


def test_they_go_into_a_cache_whole(tmp_path):
    tokenizer = ClipTokenizer.from_folder(write_clip_folder(tmp_path / "t", 400))
    opened = PromptCache.open(STARTER, tokenizer, tmp_path)
    assert (len(opened), opened.num_duplicates, opened.num_truncated) == (
        *(len(LINES), 0, 0),
    )
    assert opened.text(len(LINES) - 1) == LINES[-1]
