"""Prompts: reading files and their faults, caches, embeddings, and batches."""

import csv
import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata

import jax.numpy as jnp
import numpy as np
import pytest
from clip_folders import write_clip_folder

from boot_jax import distributed
from boot_jax.batches import batch_indices
from boot_jax.data import DataError
from boot_jax.prompts import (
    EmbeddingCache,
    Prompt,
    PromptCache,
    PromptError,
    cache,
    files,
    prompt_batches,
    read_prompts,
    storage,
)
from boot_jax.tokenizers import ClipTokenizer, PairTokenizer, Tokens, WordTokenizer

ROWS = [
    ("a red fox", "blurry"),
    ("a blue hen, singing", None),
    ('a "quoted" cat\nat night', ""),
    ("", "a prompt without its positive"),
    ("une forêt d’hiver 🌲", "low quality"),
]
# White space is made single blanks; what is blank is not there.
READ = [
    Prompt("a red fox", "blurry"),
    Prompt("a blue hen, singing", ""),
    Prompt('a "quoted" cat at night', ""),
    Prompt("une forêt d’hiver 🌲", "low quality"),
]


def write_rows(path, rows=ROWS, names=("caption", "negative")):
    """Writes rows of three columns in the format of the file's name."""
    columns = {"id": list(range(len(rows)))}
    columns |= dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    records = [
        dict(zip(columns, row, strict=True))
        for row in zip(*columns.values(), strict=True)
    ]
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith("jsonl"):
            file.writelines(json.dumps(record) + "\n" for record in records)
        else:
            dialect = "excel" if name.endswith(".csv") else "excel-tab"
            table = csv.DictWriter(file, list(columns), dialect=dialect)
            table.writeheader()
            table.writerows(records)
    return path


def texts_of(path, **columns):
    return [prompt.text for prompt in read_prompts(path, **columns)]


def refusal(path, **columns):
    """The message of the fault, which must be one line."""
    with pytest.raises(PromptError) as error:
        list(read_prompts(path, **columns))
    message = str(error.value)
    assert "\n" not in message
    return message


# --- files


FORMATS = ["csv", "tsv", "jsonl", "parquet", "csv.gz", "jsonl.gz"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_each_format_gives_the_same_prompts(tmp_path, suffix):
    path = write_rows(tmp_path / f"prompts.{suffix}")
    columns = {"column": "caption"}
    assert list(read_prompts(path, **columns, negative_column="negative")) == READ
    without = [Prompt(prompt.text, None) for prompt in READ]
    assert list(read_prompts(str(path), **columns)) == without


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "TXT"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_text_file_has_a_prompt_a_line(tmp_path, suffix, newline):
    path = tmp_path / f"prompts.{suffix}"
    lines = ["\ufeff  a  red\tfox ", "", " \t ", "cafe\u0301", "last, without an end"]
    data = newline.join(lines).encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    assert texts_of(path) == ["a red fox", "café", "last, without an end"]
    assert unicodedata.is_normalized("NFC", texts_of(path)[1])


def test_a_pattern_takes_files_in_order_of_their_names(tmp_path):
    for name, text in {
        "b.txt": "two",
        "a.txt": "one",
        "c.txt.gz": "",
        "d": "x",
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"three"))
    assert texts_of(tmp_path / "*.txt*") == ["one", "two", "three"]
    assert texts_of(tmp_path / "[b].txt") == ["two"]
    (tmp_path / "[e].txt").write_text("a name that looks like a pattern")
    assert texts_of(tmp_path / "[e].txt") == ["a name that looks like a pattern"]


def test_the_home_folder_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert texts_of("~/a.txt") == ["at home"]


def test_files_are_streamed(tmp_path):
    """The first prompts come though the file's end cannot be read."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n" * 1000 + b"\xff\n")
    assert len(list(itertools.islice(read_prompts(path), 1000))) == 1000


def test_the_longest_line_may_have_characters_of_four_bytes(tmp_path):
    path = tmp_path / "a.txt"
    line = "🦊" * files.LONGEST_LINE
    path.write_bytes(f"{line}\r\nb\r\n".encode())
    assert texts_of(path) == [line, "b"]
    path.write_text(f"a\n{line}🦊\nb\n")
    assert "a.txt, line 2: it has more than 100000 characters" in refusal(path)


def test_a_file_without_line_ends_is_not_read_whole(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(2**32)  # a sparse file of 4 GB
    assert "line 1: it has more than 100000 characters" in refusal(path)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_a_wrong_column_is_named_with_those_there_are(tmp_path, suffix):
    path = write_rows(tmp_path / f"a.{suffix}")
    for wrong in ({}, {"column": "caption", "negative_column": "prompt"}):
        message = refusal(path, **wrong)
        assert "no column 'prompt', only id, caption, negative" in message
        assert str(path) in message


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_long_prompt_in_a_table_is_refused_with_its_place(tmp_path, suffix):
    rows = [("a", "b"), ("c " * 50_001, "d")]
    path = write_rows(tmp_path / f"a.{suffix}", rows)
    message = refusal(path, column="caption")
    assert "more than 100000 characters" in message
    assert {"csv": "line 3", "jsonl": "line 2", "parquet": "row 2"}[suffix] in message


FAULTY = [
    ("a.txt", b"good\nb\xe9d\n", "a.txt, line 2: byte 2 of it is not UTF-8"),
    ("a.txt", "täst\n".encode("utf-16"), "a.txt, line 1: byte 1 of it is not UTF-8"),
    ("a.txt", b"", "there is no prompt in .*a.txt; all are blank"),
    ("a.txt", b"\n \n\t\n", "there is no prompt in .*a.txt; all are blank"),
    ("a.csv", b"", "there is no prompt in .*a.csv; all are blank"),
    ("a.csv", b"prompt\n", "there is no prompt in .*a.csv; all are blank"),
    ("a.csv", b"prompt\nb\xe9d\n", "a.csv, line 2: byte 2 of it is not UTF-8"),
    ("a.csv", b"prompt,id\na cat, asleep,1\n", "line 2: it has 3 fields, the header 2"),
    ("a.csv", b'prompt,id\na,1\n"b\nc,2\n', "line 4: it is no row .* quote open"),
    ("a.csv", b'prompt\n"' + b"word\n" * 40_000, "it is no row .* quote open"),
    ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2: it is no JSON object"),
    ("a.jsonl", b'\n["a"]\n', "line 2: it is no JSON object"),
    ("a.jsonl", b"[" * 90_000, "line 1: it is no JSON object"),
    ("a.jsonl", b'{"prompt": 3}\n', "line 1: 'prompt' is int, not a string"),
    ("a.jsonl", b'{"prompt": "a \\ud83d"}\n', "line 1: .* half of a surrogate pair"),
    ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2: .* 'prompt', only text"),
    ("a.parquet", b"PAR1 not quite PAR1", "a.parquet is no whole Parquet file"),
    ("a.parquet", b"", "a.parquet is no whole Parquet file"),
    ("a.txt.gz", b"plain text", "a.txt.gz is no whole gzip file"),
    ("a.txt.gz", gzip.compress(b"word\n" * 999)[:-9], "is no whole gzip file"),
    ("a.txt.gz", gzip.compress(b"w")[:12] + b"\xff" * 20, "is no whole gzip file"),
    ("a.doc", b"a", "a.doc is of no known kind; its name must end with one of .txt"),
    ("a.parquet.gz", b"a", "is of no known kind"),
    ("prompts", b"a", "is of no known kind"),
]


@pytest.mark.parametrize(
    "name, data, message", FAULTY, ids=[f"{i}-{row[0]}" for i, row in enumerate(FAULTY)]
)
def test_faults_are_one_line_with_the_place(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PromptError, match=message) as error:
        list(read_prompts(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_parquet_column_of_numbers_is_refused(tmp_path):
    path = write_rows(tmp_path / "a.parquet")
    assert "row 1: 'id' is int, not a string" in refusal(path, column="id")


def test_faults_of_the_path_come_before_the_first_prompt(tmp_path):
    for name in ("a.txt", "b.csv"):
        (tmp_path / name).write_text("prompt\nx\n")
    for path, message in {
        "c.txt": "there is no file .*c.txt",
        "*.tsv": "no file matches the pattern .*tsv",
        "*": r"files of several kinds, such as .*a\.txt and .*b\.csv",
        "": r"is a folder; give a file or a pattern, such as .*\*\.txt",
    }.items():
        with pytest.raises(PromptError, match=message):
            read_prompts(tmp_path / path)
    with pytest.raises(PromptError, match=r"gs://b/a\.txt is an address"):
        read_prompts("gs://b/a.txt")
    with pytest.raises(PromptError, match="is text and has no column 'negative'"):
        read_prompts(tmp_path / "a.txt", negative_column="negative")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    assert "a.txt cannot be read (Permission denied)" in refusal(tmp_path / "a.txt")


def test_a_file_that_vanishes_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    prompts = read_prompts(tmp_path / "a.txt")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(PromptError, match=r"a\.txt cannot be read \(No such file"):
        next(prompts)


def test_missing_pyarrow_is_named(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs one more package: pip install pyarrow" in refusal(path)


# --- the cache of tokens


WORDS = WordTokenizer.from_prompts([text for text, _ in READ], length=4)


def write_numbered(path, count, repeats=()):
    """Prompts that say their index, then repeats of some."""
    numbers = [*range(count), *repeats]
    path.write_text("".join(f"prompt {number}\n" for number in numbers))
    return path


def numbered_words(count):
    return WordTokenizer(["prompt", *map(str, range(count))], 2)


class Counting:
    """A tokenizer that knows how many prompts it has seen."""

    def __init__(self, tokenizer):
        self._tokenizer, self.seen = tokenizer, 0
        self.row_shape = tokenizer.row_shape
        self.vocabulary_size = tokenizer.vocabulary_size
        self.fingerprint = tokenizer.fingerprint

    def __call__(self, prompts) -> Tokens:
        self.seen += len(prompts)
        return self._tokenizer(prompts)


def all_of(opened):
    return opened.take(np.arange(len(opened)))


def test_a_cache_holds_distinct_prompts_their_tokens_and_texts(tmp_path, capfd):
    rows = [*ROWS, ("a  red fox", "blurry"), ("A red fox", "blurry"), ("a red fox", "")]
    path = write_rows(tmp_path / "a.jsonl", rows)
    opened = PromptCache.open(path, WORDS, tmp_path / "cache", column="caption")
    texts = [text for text, _ in READ] + ["A red fox"]
    assert [opened.text(i) for i in range(len(opened))] == texts
    tokens = all_of(opened)
    assert tokens.keys() == {"tokens"}
    assert tokens["tokens"].dtype == np.int32
    np.testing.assert_array_equal(tokens["tokens"], WORDS(texts).ids)
    assert (opened.num_duplicates, opened.num_truncated) == (2, 1)
    assert not opened.has_negatives
    assert opened.row_shape == (4,)
    for wrong in (-1, 5):
        with pytest.raises(IndexError, match=f"no prompt {wrong}, only 0 to 4"):
            opened.text(wrong)
    report = (
        "prompts: 5 distinct prompts; 2 duplicates were left out, 1 too long for 4 "
        "tokens were cut\n"
    )
    assert report in capfd.readouterr().err
    meta = json.loads((opened.folder / "meta.json").read_text())
    assert (meta["num_prompts"], meta["num_duplicates"], meta["num_truncated"]) == (
        *(5, 2, 1),
    )
    # It is said once.
    PromptCache.open(path, WORDS, tmp_path / "cache", column="caption")
    assert not capfd.readouterr().err


def test_negative_prompts_are_tokens_too(tmp_path):
    rows = [*ROWS, ("a red fox", "low quality and more than four words"), ROWS[0]]
    path = write_rows(tmp_path / "a.csv", rows)
    opened = PromptCache.open(
        path, WORDS, tmp_path, column="caption", negative_column="negative"
    )
    expected = [*READ, Prompt("a red fox", rows[-2][1])]  # the pair is a new one
    tokens = all_of(opened)
    assert opened.has_negatives and tokens.keys() == {"tokens", "negative_tokens"}
    for name, column in zip(tokens, zip(*expected, strict=True), strict=True):
        np.testing.assert_array_equal(tokens[name], WORDS(column).ids)
    assert (opened.num_duplicates, len(opened)) == (1, 5)
    assert (opened.num_truncated, opened.num_truncated_negatives) == (1, 1)


def test_pairs_of_tokens_are_kept(tmp_path):
    clip = ClipTokenizer.from_folder(write_clip_folder(tmp_path / "t", 16))
    pair = PairTokenizer(clip, clip)
    path = write_numbered(tmp_path / "a.txt", 10)
    opened = PromptCache.open(path, pair, tmp_path)
    np.testing.assert_array_equal(all_of(opened)["tokens"], pair(texts_of(path)).ids)


@pytest.mark.parametrize("size, stored", [(2**16 - 2, "uint16"), (2**16 - 1, "int32")])
def test_ids_take_two_bytes_where_they_fit(tmp_path, size, stored):
    tokenizer = numbered_words(size - 1)
    path = tmp_path / "a.txt"
    path.write_text(f"prompt {size - 2}")
    opened = PromptCache.open(path, tokenizer, tmp_path)
    assert np.load(opened.folder / "tokens.npy").dtype == stored
    assert all_of(opened)["tokens"].tolist() == [[2, size + 1]]


@pytest.mark.parametrize("limit", ["_CHUNK", "_CHUNK_CHARACTERS"])
def test_chunks_change_nothing(tmp_path, monkeypatch, limit):
    path = write_numbered(tmp_path / "a.txt", 100, range(50))
    whole = all_of(PromptCache.open(path, numbered_words(100), tmp_path / "a"))
    monkeypatch.setattr(cache, limit, 7)
    counting = Counting(numbered_words(100))
    parts = PromptCache.open(path, counting, tmp_path / "b")
    np.testing.assert_array_equal(all_of(parts)["tokens"], whole["tokens"])
    assert counting.seen == len(parts) == 100
    assert [parts.text(i) for i in range(100)] == [f"prompt {i}" for i in range(100)]


def test_the_key_is_all_that_decides_the_tokens(tmp_path):
    def folder(path, tokenizer=WORDS, **columns):
        columns = {"column": "caption"} | columns
        return PromptCache.open(path, tokenizer, tmp_path / "cache", **columns).folder

    path = write_rows(tmp_path / "a.csv")
    first = folder(path)
    others = [
        folder(write_rows(tmp_path / "b.csv", ROWS[::-1])),
        folder(path, negative_column="negative"),
        folder(path, column="negative"),
        folder(path, WordTokenizer(WORDS.vocabulary, 5)),
    ]
    assert len({first, *others}) == 5
    assert folder(path) == first
    shutil.copy(path, tmp_path / "of another name.csv")
    assert folder(tmp_path / "of another name.csv") == first


def test_an_opened_cache_is_not_tokenized_again(tmp_path):
    path = write_numbered(tmp_path / "a.txt", 20, [3, 3])
    counting = Counting(numbered_words(20))
    for _ in range(3):
        PromptCache.open(path, counting, tmp_path / "cache")
    assert counting.seen == 20


@pytest.mark.parametrize(
    "name", ["tokens.npy", "offsets.npy", "texts.bin", "meta.json"]
)
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_cache_is_built_anew_with_a_word(tmp_path, capfd, name, how):
    path = write_numbered(tmp_path / "a.txt", 20)
    opened = PromptCache.open(path, numbered_words(20), tmp_path / "cache")
    expected = all_of(opened)["tokens"]
    victim = opened.folder / name
    data = bytearray(victim.read_bytes())
    if how == "flip":
        data[0 if name == "meta.json" else -3] ^= 1
        victim.write_bytes(data)
    elif how == "cut":
        victim.write_bytes(data[:-1])
    else:
        victim.unlink()
    capfd.readouterr()
    again = PromptCache.open(path, numbered_words(20), tmp_path / "cache")
    assert "is damaged" in capfd.readouterr().err
    np.testing.assert_array_equal(all_of(again)["tokens"], expected)
    assert [again.text(i) for i in (0, 19)] == ["prompt 0", "prompt 19"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [again.folder.name]
    # What was open before is still there for whoever had it.
    if how == "remove":
        np.testing.assert_array_equal(all_of(opened)["tokens"], expected)


def test_a_fault_leaves_nothing_behind(tmp_path):
    path = write_numbered(tmp_path / "a.txt", 20)
    with path.open("ab") as file:
        file.write(b"\xff")
    with pytest.raises(PromptError, match=r"line 21: byte 1 of it is not UTF-8"):
        PromptCache.open(path, numbered_words(20), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_faults_come_before_the_tokens(tmp_path):
    """Not after an hour of them."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n" * 100 + b"\xff")
    counting = Counting(WORDS)
    with pytest.raises(PromptError, match="not UTF-8"):
        PromptCache.open(path, counting, tmp_path / "cache")
    assert not counting.seen


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    path = write_numbered(tmp_path / "a.txt", 2)
    with pytest.raises(PromptError, match=r"cannot write to .*a\.txt.* another cache_"):
        PromptCache.open(path, numbered_words(2), path / "cache")


def test_a_folder_that_some_process_does_not_see_is_refused(tmp_path, monkeypatch):
    path = write_numbered(tmp_path / "a.txt", 2)
    monkeypatch.setattr(distributed, "wait_for_all", lambda condition: False)
    with pytest.raises(
        PromptError, match=r"not every process sees .* storage that all"
    ):
        PromptCache.open(path, numbered_words(2), tmp_path / "cache")


def test_files_that_change_while_they_are_read_are_refused(tmp_path):
    path = write_numbered(tmp_path / "a.txt", 20)

    class Meddling(Counting):
        def __call__(self, prompts):
            write_numbered(path, 21)
            return super().__call__(prompts)

    with pytest.raises(PromptError, match="changed while it was read; start again"):
        PromptCache.open(path, Meddling(numbered_words(30)), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_never_reads_back_whole_is_given_up(tmp_path, monkeypatch):
    path = write_numbered(tmp_path / "a.txt", 20)
    monkeypatch.setattr(storage, "_verified", lambda folder: None)
    with pytest.raises(PromptError, match="written 3 times and never read back whole"):
        PromptCache.open(path, numbered_words(20), tmp_path / "cache")


def test_threads_that_open_at_once_find_one_whole_cache(tmp_path):
    path = write_numbered(tmp_path / "a.txt", 300)
    opened, meeting = [], threading.Barrier(4)

    class Meeting(Counting):
        def __call__(self, prompts):
            meeting.wait(timeout=30)  # all of them build
            return super().__call__(prompts)

    def open_one():
        tokenizer = Meeting(numbered_words(300))
        opened.append(PromptCache.open(path, tokenizer, tmp_path / "cache"))

    threads = [threading.Thread(target=open_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(opened) == 4
    expected = numbered_words(300)([f"prompt {i}" for i in range(300)]).ids
    for one in opened:
        np.testing.assert_array_equal(all_of(one)["tokens"], expected)
    assert len(list((tmp_path / "cache").iterdir())) == 1


BUILD = """
import sys, time
from boot_jax.prompts import PromptCache, cache
from boot_jax.tokenizers import WordTokenizer

folder, pause = sys.argv[1], float(sys.argv[2])
cache._CHUNK = 10
words = WordTokenizer(["prompt", *map(str, range(300))], 2)

class Slow(WordTokenizer):
    def __call__(self, prompts):
        time.sleep(pause)
        return super().__call__(prompts)

slow = Slow(words.vocabulary, 2)
print(len(PromptCache.open(folder + "/a.txt", slow, folder + "/cache")))
"""


def build(folder, pause):
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(folder), str(pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_kill_in_the_middle_leaves_no_half_cache(tmp_path):
    path = write_numbered(tmp_path / "a.txt", 300)
    process = build(tmp_path, 0.5)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cache/*.partial-*/texts.bin")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (partial,) = (tmp_path / "cache").iterdir()
    counting = Counting(numbered_words(300))
    opened = PromptCache.open(path, counting, tmp_path / "cache")
    assert counting.seen == len(opened) == 300
    # It might be alive on another machine; once it surely is not, it goes.
    assert partial.exists()
    for file in (partial, *partial.iterdir()):
        os.utime(file, times=(0, 0))
    PromptCache.open(path, WordTokenizer(["x"], 2), tmp_path / "cache")
    assert partial.exists()  # of another key: not ours to judge
    shutil.rmtree(opened.folder)
    PromptCache.open(path, counting, tmp_path / "cache")
    assert not partial.exists()


@pytest.mark.slow
def test_processes_that_open_at_once_find_one_whole_cache(tmp_path):
    write_numbered(tmp_path / "a.txt", 300)
    processes = [build(tmp_path, 0.02) for _ in range(4)]
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "300\n"), errors
        assert "damaged" not in errors
    assert len(list((tmp_path / "cache").iterdir())) == 1


TOGETHER = """
import sys, time
import numpy as np
from boot_jax import distributed
from boot_jax.prompts import EmbeddingCache, PromptCache, prompt_batches
from boot_jax.tokenizers import WordTokenizer

folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
distributed.start(
    coordinator_address=f"localhost:{port}", num_processes=2, process_id=index
)
calls = []

class Words(WordTokenizer):
    def __call__(self, prompts):
        calls.append(len(prompts))
        time.sleep(35)  # longer than a collective waits
        return super().__call__(prompts)

words = Words(["prompt", *map(str, range(300))], 2)
opened = PromptCache.open(folder + "/a.txt", words, folder + "/cache")

def encode(tokens):
    calls.append(len(tokens))
    return {"context": tokens[..., None].astype(np.float32)}

embedded = EmbeddingCache.open(opened, encode, "e", folder + "/cache", dtype="float32")
rows = slice(4 * index, 4 * index + 4)
batch = next(prompt_batches(opened, 8, 5, rows=rows))["tokens"]
same = next(prompt_batches(embedded, 8, 5, rows=rows))["context"]
np.testing.assert_array_equal(batch, same[..., 0])
try:
    PromptCache.open(folder + "/b.txt", words, folder + "/cache")
except ValueError as error:
    print("refused:", error)
print(bool(calls), batch[0, :, 1].tolist())
"""


@pytest.mark.slow
def test_two_processes_of_a_run_share_a_cache_that_the_first_builds(tmp_path):
    import socket

    path = write_numbered(tmp_path / "a.txt", 300)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path), port, str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    outs = []
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        outs.append(out.splitlines()[-2:])  # gloo has a word to say before
    alone = PromptCache.open(path, numbered_words(300), tmp_path / "cache")
    batch = next(prompt_batches(alone, 8, 5))["tokens"][0, :, 1].tolist()
    assert [out[1] for out in outs] == [f"True {batch[:4]}", f"False {batch[4:]}"]
    for out in outs:
        assert out[0].startswith("refused: there is no file ")


def test_memory_does_not_grow_with_the_file(tmp_path):
    """But by the hashes: 50 bytes a prompt, where tokens are 1024."""
    program = """
import resource, sys
from boot_jax.prompts import PromptCache
from boot_jax.tokenizers import WordTokenizer

words = WordTokenizer(["prompt"], 512)
peaks = []
for count in (10_000, 10_000, 100_000):
    path = f"{sys.argv[1]}/{count}.txt"
    with open(path, "w") as file:
        file.writelines(f"prompt {i}\\n" for i in range(count))
    PromptCache.open(path, words, f"{sys.argv[1]}/cache{len(peaks)}")
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print((peaks[2] - peaks[1]) / 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20, "MB more for 90,000 prompts, 88 MB of tokens"


# --- the cache of embeddings


def encode(tokens):
    """Two entries of floating point, one of integers."""
    assert tokens.shape[0] == 3  # the chunk size, also of the last chunk
    frequencies = np.arange(1, 5, dtype=np.float32)
    features = np.sin(tokens[..., None].astype(np.float32) * frequencies)
    return {
        "context": jnp.asarray(features),
        "pooled": features.mean(axis=1) * 100,
        "length": (tokens > 0).sum(axis=1, dtype=np.int32),
    }


def open_embeddings(prompts, folder, **options):
    options = {"dtype": "float32", "chunk_size": 3} | options
    return EmbeddingCache.open(prompts, encode, "sine", folder, **options)


@pytest.fixture
def with_negatives(tmp_path):
    path = write_rows(tmp_path / "a.csv")
    columns = {"column": "caption", "negative_column": "negative"}
    return PromptCache.open(path, WORDS, tmp_path / "cache", **columns)


@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 0.0), ("float16", 1e-3), ("bfloat16", 8e-3)]
)
def test_embeddings_are_those_of_the_tokens(tmp_path, with_negatives, dtype, tolerance):
    embedded = open_embeddings(with_negatives, tmp_path / "cache", dtype=dtype)
    assert len(embedded) == len(with_negatives) == 4
    indices = np.asarray([3, 0, 3])
    taken = embedded.take(indices)
    names = {"context", "pooled", "length"}
    assert taken.keys() == names | {f"negative_{name}" for name in names}
    for source, ids in with_negatives.take(indices).items():
        for name, rows in encode(ids).items():
            kept = taken[source.removesuffix("tokens") + name]
            expected = "int32" if name == "length" else dtype
            assert (kept.dtype.name, kept.shape) == (expected, rows.shape)
            np.testing.assert_allclose(
                kept.astype(np.float32), rows, rtol=tolerance, atol=0
            )


def test_embeddings_are_made_once_for_each_encoder_dtype_and_prompts(tmp_path):
    path = write_numbered(tmp_path / "a.txt", 7)
    prompts = PromptCache.open(path, numbered_words(7), tmp_path)
    other = PromptCache.open(path, numbered_words(8), tmp_path)
    calls = []

    def counted(tokens):
        calls.append(len(tokens))
        return encode(tokens)

    def folder(of=prompts, fingerprint="a", **options):
        options = {"chunk_size": 3} | options
        return EmbeddingCache.open(of, counted, fingerprint, tmp_path, **options).folder

    first = folder()
    assert calls == [3, 3, 3]
    assert folder() == first and len(calls) == 3
    others = {folder(other), folder(fingerprint="b"), folder(dtype="float16")}
    assert len({first} | others) == 4 and len(calls) == 12


def test_damaged_embeddings_are_made_anew(tmp_path, with_negatives, capfd):
    embedded = open_embeddings(with_negatives, tmp_path)
    expected = all_of(embedded)
    victim = embedded.folder / "negative_pooled.npy"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    again = all_of(open_embeddings(with_negatives, tmp_path))
    assert "negative_pooled.npy is not as it was written" in capfd.readouterr().err
    for name, rows in expected.items():
        np.testing.assert_array_equal(again[name], rows)


def test_embeddings_that_cannot_be_kept_are_refused(tmp_path, with_negatives):
    def huge(tokens):
        return {"context": np.full((len(tokens), 2), 1e5, np.float32)}

    def broken(tokens):
        return {"context": np.full((len(tokens), 2), np.nan, np.float32)}

    def growing(tokens):
        sizes.append(len(sizes) + 1)
        return {"context": np.zeros((len(tokens), sizes[-1]), np.float32)}

    sizes = []
    for wrong, dtype, message in (
        (huge, "float16", "'context' is too large for float16; use bfloat16"),
        (broken, "float32", "'context' is not finite"),
        (encode, "float64", "cannot be kept as 'float64'; use bfloat16, float16"),
        (growing, "float32", r"context\.npy has rows of shape \(1,\), not of \(3,\)"),
    ):
        with pytest.raises(PromptError, match=message):
            EmbeddingCache.open(
                *(with_negatives, wrong, "wrong", tmp_path / "new"),
                dtype=dtype,
                chunk_size=3,
            )
    assert not list((tmp_path / "new").iterdir())
    options = {"dtype": "bfloat16", "chunk_size": 3}
    kept = EmbeddingCache.open(with_negatives, huge, "h", tmp_path, **options)
    assert kept.take(np.arange(1))["context"].astype(np.float32) == pytest.approx(
        np.full((1, 2), 1e5), rel=4e-3
    )


# --- batches


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ten")
    path = write_numbered(folder / "a.txt", 10)
    return PromptCache.open(path, numbered_words(10), folder)


def take(count, *args, **kwargs):
    iterator = prompt_batches(*args, **kwargs)
    items = list(itertools.islice(iterator, count))
    iterator.close()
    return items


def test_items_hold_the_prompts_of_their_steps(ten):
    items = take(3, ten, 4, 7, start_step=2, steps_per_dispatch=3)
    for item, first in zip(items, (2, 5, 8), strict=True):
        assert item.keys() == {"tokens"}
        assert (item["tokens"].shape, item["tokens"].dtype) == ((3, 4, 2), np.int32)
        order = [batch_indices(10, 4, 7, step) for step in range(first, first + 3)]
        np.testing.assert_array_equal(item["tokens"][..., 1] - 3, order)


def test_resuming_and_dispatching_change_nothing(ten):
    through = np.concatenate([item["tokens"] for item in take(12, ten, 4, 7)])
    for start, steps in ((0, 4), (4, 2), (5, 3), (11, 1)):
        item = take(1, ten, 4, 7, start, steps)[0]["tokens"]
        np.testing.assert_array_equal(item, through[start : start + steps])


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_read_parts_of_the_same_batch(ten, processes):
    whole = take(2, ten, 6, 1, steps_per_dispatch=2)
    size = 6 // processes
    parts = [
        take(2, ten, 6, 1, 0, 2, rows=slice(i, i + size)) for i in range(0, 6, size)
    ]
    for number, item in enumerate(whole):
        joined = np.concatenate([part[number]["tokens"] for part in parts], axis=1)
        np.testing.assert_array_equal(joined, item["tokens"])


def test_batches_may_be_larger_than_all_prompts(ten):
    batch = take(1, ten, 25, 0)[0]["tokens"][0, :, 1] - 3
    assert sorted(np.bincount(batch)) == [2] * 5 + [3] * 5


def test_batches_of_negatives_and_embeddings_belong_together(tmp_path, with_negatives):
    embedded = open_embeddings(with_negatives, tmp_path)
    tokens = take(2, with_negatives, 3, 5, steps_per_dispatch=2)
    for item, features in zip(
        tokens, take(2, embedded, 3, 5, steps_per_dispatch=2), strict=True
    ):
        assert item.keys() == {"tokens", "negative_tokens"}
        for prefix in ("", "negative_"):
            ids = item[prefix + "tokens"]
            for step in range(2):
                expected = np.asarray(encode(ids[step])["context"])
                np.testing.assert_array_equal(
                    features[prefix + "context"][step], expected
                )


def test_impossible_batches_are_refused_at_once(ten):
    with pytest.raises(DataError, match="must be at least 1, seed and step"):
        prompt_batches(ten, 0, 0)
    with pytest.raises(DataError, match="steps_per_dispatch must be at least 1: 0"):
        prompt_batches(ten, 1, 0, 0, 0)


def test_the_thread_that_reads_ends_with_the_iteration(ten):
    def reading():
        names = [thread.name for thread in threading.enumerate()]
        return [name for name in names if name.startswith("boot_jax-batches")]

    assert not reading()
    iterator = prompt_batches(ten, 2, 0)
    next(iterator)
    assert len(reading()) == 1
    iterator.close()
    assert not reading()
