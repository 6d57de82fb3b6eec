import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from clip_folders import END, SD1, SDXL_2, START, write_clip_folder

from boot_jax.tokenizers import (
    ClipTokenizer,
    PairTokenizer,
    TokenizerError,
    WordTokenizer,
)

HARD_PROMPTS = [
    "",
    " ",
    "!",
    "!!! wow !!!",
    "A photograph of an Astronaut, riding a HORSE!",
    "it's they're don't I'VE we'll I'd 'M o'clock rock'n'roll",
    "tabs\tand\nlines\r\n and \u00a0 odd\u2003blanks\u3000here \u200b\u200d",
    "naïve café cafe\u0301 Ångström ÆØÅ İstanbul Straße ẞ ﬁne ①②",
    "1984 3.14159 1,000,000 50% 2nd x2 ٣ Ⅳ ½",
    "🦊 🐻‍❄️ 👩🏽‍🚀 🇳🇴 ❤️‍🔥 smile:)",
    "狐狸在月光下 きつね 여우 лиса अग्नि ثعلب שועל",
    "snake_case, kebab-case; (brackets) [square] {curly} <tag> #hash @at &c. ~^`|\\/",
    f"{START} literal {END} specials {START.upper()}{END.upper()}",
    "<|endoftext|>!<|startoftext|>",
    "“quoted” ‘single’ — dash … ellipsis",
    "\x00\x07 control \x7f \ufeff mark \ufffd",
    "𝓯𝓪𝓷𝓬𝔂 𝕋𝕖𝕩𝕥 ｆｕｌｌｗｉｄｔｈ",
    "the small red house " * 40,
    "!" * 200,
    "supercalifragilisticexpialidocious" * 10,
    "photograph " * 75,
    "photograph " * 76,
]


def made_up_prompts(count):
    """Prompts of words, signs and random characters, of up to 150 pieces."""
    generator = random.Random(0)
    words = "a The house RIVER's café 12 won't moon-light é 🌙 月 ! ... & <|endoftext|>"
    pieces = [*words.split(), " ", "\n"]
    ranges = [(32, 127), (160, 0x250), (0x370, 0x500), (0x4E00, 0x4F00)]
    prompts = []
    for _ in range(count):
        parts = []
        for _ in range(generator.choice([3, 10, 30, 150])):
            if generator.random() < 0.7:
                parts.append(generator.choice(pieces))
            else:
                parts.append(chr(generator.randrange(*generator.choice(ranges))))
        prompts.append(generator.choice(["", " "]).join(parts))
    return prompts


PROMPTS = HARD_PROMPTS + made_up_prompts(400)


def reference_ids(folder, length):
    from transformers import CLIPTokenizerFast

    reference = CLIPTokenizerFast.from_pretrained(folder)
    return reference(
        PROMPTS, padding="max_length", truncation=True, max_length=length
    ).input_ids


def added(content, **flags):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "special": True}
    return {"content": content, "normalized": True, **plain, **flags}


@pytest.mark.parametrize("length", [77, 16])
@pytest.mark.parametrize("special", [SD1, SDXL_2], ids=["sd1", "sdxl_2"])
def test_ids_are_those_of_transformers(tmp_path, special, length):
    folder = write_clip_folder(tmp_path / "tokenizer", length, special)
    tokens = ClipTokenizer.from_folder(folder)(PROMPTS)
    assert tokens.ids.dtype == np.int32
    assert tokens.truncated.dtype == bool
    assert 0 < tokens.truncated.sum() < len(PROMPTS)
    np.testing.assert_array_equal(tokens.ids, reference_ids(folder, length))


@pytest.mark.parametrize("normalized", [False, True])
def test_ids_with_added_tokens_are_those_of_transformers(tmp_path, normalized):
    """Newer releases write all tokens with their flags; also ones beyond CLIP's."""
    decoder = {
        "0": added("!", normalized=normalized),
        "630": added(START, normalized=normalized),
        "631": added(END, normalized=normalized),
        "632": added("moon-light", special=False, lstrip=True, normalized=normalized),
        "633": added("<é>", single_word=True, normalized=normalized),
    }
    folder = write_clip_folder(
        tmp_path / "tokenizer", special=SDXL_2, added_tokens_decoder=decoder
    )
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert [vocabulary[token] for token in ("!", START, END)] == [0, 630, 631]
    tokens = ClipTokenizer.from_folder(folder)(PROMPTS)
    assert 632 in tokens.ids
    assert ClipTokenizer.from_folder(folder).vocabulary_size == 634
    np.testing.assert_array_equal(tokens.ids, reference_ids(folder, 77))


def test_the_map_of_special_tokens_prevails_in_older_folders(tmp_path):
    folder = write_clip_folder(tmp_path / "tokenizer", special=SDXL_2, pad_token=END)
    tokens = ClipTokenizer.from_folder(folder)([""])
    assert tokens.ids[0, -1] == 0
    np.testing.assert_array_equal(
        ClipTokenizer.from_folder(folder)(PROMPTS).ids, reference_ids(folder, 77)
    )


def test_tokenizer_json_alone_will_do(tmp_path):
    from transformers import CLIPTokenizerFast

    folder = write_clip_folder(tmp_path / "tokenizer", special=SDXL_2)
    whole = ClipTokenizer.from_folder(folder)
    reference = CLIPTokenizerFast.from_pretrained(folder)
    reference(["a"], padding="max_length", truncation=True, max_length=5)
    reference.save_pretrained(tmp_path / "saved")  # With this padding in it.
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "saved" / name).unlink()
    alone = ClipTokenizer.from_folder(tmp_path / "saved")
    np.testing.assert_array_equal(alone(PROMPTS).ids, whole(PROMPTS).ids)
    assert alone.row_shape == (77,)


def test_a_row_is_start_prompt_end_padding(tmp_path):
    tokenizer = ClipTokenizer.from_folder(write_clip_folder(tmp_path / "t", 6, SDXL_2))
    tokens = tokenizer(["", "photograph", "photograph " * 4, "photograph " * 5])
    assert tokens.truncated.tolist() == [False, False, False, True]
    start, end, pad = 630, 631, 0
    word = int(tokens.ids[1, 1])
    assert tokens.ids.tolist() == [
        [start, end, pad, pad, pad, pad],
        [start, word, end, pad, pad, pad],
        [start, *[word] * 4, end],
        [start, *[word] * 4, end],
    ]
    assert tokenizer([]).ids.shape == (0, 6)


@pytest.mark.parametrize("length", [None, 10**30])
def test_a_row_has_77_tokens_where_no_length_is_named(tmp_path, length):
    folder = write_clip_folder(tmp_path / "tokenizer", length)
    assert ClipTokenizer.from_folder(folder).row_shape == (77,)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    bare = ClipTokenizer.from_folder(folder)
    assert bare.row_shape == (77,)
    np.testing.assert_array_equal(bare(PROMPTS).ids, reference_ids(folder, 77))


def test_fingerprints_tell_tokenizers_apart(tmp_path):
    folders = [
        write_clip_folder(tmp_path / "a"),
        write_clip_folder(tmp_path / "b", 76),
        write_clip_folder(tmp_path / "c", special=SDXL_2),
        write_clip_folder(tmp_path / "d"),
    ]
    merges = (folders[3] / "merges.txt").read_text().splitlines()
    (folders[3] / "merges.txt").write_text("\n".join(merges[:-1]))
    tokenizers = [ClipTokenizer.from_folder(folder) for folder in folders]
    tokenizers += [
        PairTokenizer(tokenizers[0], tokenizers[2]),
        PairTokenizer(tokenizers[2], tokenizers[0]),
        WordTokenizer(["a"], 77),
        WordTokenizer(["a"], 76),
        WordTokenizer(["b"], 77),
    ]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == len(tokenizers)


def test_fingerprints_are_the_same_in_another_process(tmp_path):
    folder = write_clip_folder(tmp_path / "tokenizer", special=SDXL_2)
    program = (
        "from boot_jax.tokenizers import ClipTokenizer\n"
        f"print(ClipTokenizer.from_folder({str(folder)!r}).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    fingerprint = ClipTokenizer.from_folder(folder).fingerprint
    assert (done.stdout.strip(), done.returncode) == (fingerprint, 0), done.stderr


def test_neither_transformers_nor_torch_is_imported(tmp_path):
    folder = write_clip_folder(tmp_path / "tokenizer")
    program = (
        "import sys\n"
        "from boot_jax.tokenizers import ClipTokenizer\n"
        f"ClipTokenizer.from_folder({str(folder)!r})(['a'])\n"
        "print({'transformers', 'torch'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout.strip(), done.returncode) == ("set()", 0), done.stderr


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("merges.txt", None, "it needs vocab.json and merges.txt, or tokenizer.json"),
        ("vocab.json", None, "it needs vocab.json and merges.txt, or tokenizer.json"),
        ("vocab.json", "{", r"vocab\.json cannot be read .*; fetch it again"),
        ("vocab.json", "[]", r"vocab\.json holds no JSON object; fetch it again"),
        ("merges.txt", "#version\nzz qq\n", "is damaged .*; fetch it again"),
        ("merges.txt", "#version\na b c\n", "is damaged .*; fetch it again"),
        ("tokenizer_config.json", "\x00", "cannot be read .*; fetch it again"),
        (
            "special_tokens_map.json",
            '{"pad_token": {"normalized": true}}',
            "special tokens in .* are damaged .*; fetch it again",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {}}}',
            "special tokens in .* are damaged .*; fetch it again",
        ),
        (
            "tokenizer_config.json",
            '{"model_max_length": 1}',
            "must hold the start and the end token: 1 is too short",
        ),
    ],
)
def test_bad_folders_are_refused_in_one_line(tmp_path, name, text, message):
    folder = write_clip_folder(tmp_path / "tokenizer")
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(TokenizerError, match=message) as refusal:
        ClipTokenizer.from_folder(folder)
    assert "\n" not in str(refusal.value)


def test_a_damaged_tokenizer_json_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(TokenizerError, match=r"is damaged .*; fetch it again"):
        ClipTokenizer.from_folder(tmp_path)


def test_a_pair_stacks_the_ids_of_both(tmp_path):
    first = ClipTokenizer.from_folder(write_clip_folder(tmp_path / "a"))
    second = ClipTokenizer.from_folder(
        write_clip_folder(tmp_path / "b", special=SDXL_2)
    )
    pair = PairTokenizer(first, second)
    # A literal end token is one token to both, but "!" breaks words of the second only.
    tokens = pair(PROMPTS)
    assert pair.row_shape == (2, 77)
    assert first.vocabulary_size == int(first([END]).ids.max()) + 1 == 632
    larger = WordTokenizer([str(i) for i in range(1000)], 77)
    assert PairTokenizer(first, larger).vocabulary_size == 1002
    assert tokens.ids.shape == (len(PROMPTS), 2, 77)
    np.testing.assert_array_equal(tokens.ids[:, 0], first(PROMPTS).ids)
    np.testing.assert_array_equal(tokens.ids[:, 1], second(PROMPTS).ids)
    short = WordTokenizer(["a"], 1), WordTokenizer(["b"], 1)
    assert PairTokenizer(*short)(["a b", "a"]).truncated.tolist() == [True, False]


def test_a_pair_reports_what_one_alone_truncates(tmp_path):
    first = ClipTokenizer.from_folder(write_clip_folder(tmp_path / "a", 6))
    words = WordTokenizer(["photograph"], 6)
    prompts = ["photograph " * 5, "photograph"]
    assert words(prompts).truncated.tolist() == [False, False]
    for pair in (PairTokenizer(first, words), PairTokenizer(words, first)):
        assert pair(prompts).truncated.tolist() == [True, False]


def test_a_pair_of_two_lengths_is_refused():
    with pytest.raises(TokenizerError, match=r"one shape, not \(3,\) and \(4,\)"):
        PairTokenizer(WordTokenizer(["a"], 3), WordTokenizer(["a"], 4))


# --- words


def test_words_have_ids_in_order():
    tokenizer = WordTokenizer(["blue", "a", "fox"], 3)
    assert tokenizer.row_shape == (3,)
    assert tokenizer.vocabulary_size == 5
    tokens = tokenizer(["A  blue\tFOX", "", "a hen", "fox fox fox fox"])
    assert tokens.ids.dtype == np.int32
    assert tokens.ids.tolist() == [[3, 2, 4], [0, 0, 0], [3, 1, 0], [4, 4, 4]]
    assert tokens.truncated.tolist() == [False, False, False, True]


def test_a_vocabulary_is_built_sorted():
    prompts = iter(["A red fox", "a blue hen sings loudly"])
    tokenizer = WordTokenizer.from_prompts(prompts)
    assert tokenizer.vocabulary == ("a", "blue", "fox", "hen", "loudly", "red", "sings")
    assert tokenizer.row_shape == (5,)
    assert WordTokenizer.from_prompts(["a b c"], length=2).row_shape == (2,)
    assert WordTokenizer.from_prompts([""]).row_shape == (1,)


def test_unknown_words_are_counted_most_frequent_first():
    tokenizer = WordTokenizer(["a"], 2)
    found = tokenizer.unknown_words(["a B c", "c", "C a a a a d"])
    assert list(found.items()) == [("c", 3), ("b", 1), ("d", 1)]
    assert tokenizer.unknown_words(["A a"]) == {}


def test_json_keeps_a_word_tokenizer():
    tokenizer = WordTokenizer(["naïve", "狐"], 4)
    again = WordTokenizer.from_json(tokenizer.to_json())
    assert again.fingerprint == tokenizer.fingerprint
    prompts = ["naïve 狐 fox", "x"]
    np.testing.assert_array_equal(again(prompts).ids, tokenizer(prompts).ids)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"length": 3}'])
def test_other_json_is_refused(text):
    with pytest.raises(TokenizerError, match="object with a vocabulary and a length"):
        WordTokenizer.from_json(text)


@pytest.mark.parametrize("word", ["Upper", "two words", "", " a", "twice"])
def test_what_is_no_word_of_a_vocabulary_is_refused(word):
    with pytest.raises(TokenizerError, match="single words in lower case, each once"):
        WordTokenizer(["twice", word], 3)


def test_a_row_without_words_is_refused():
    with pytest.raises(TokenizerError, match="at least 1 word, not 0"):
        WordTokenizer(["a"], 0)
