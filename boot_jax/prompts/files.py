"""Prompts from files, one after the other: text, JSON lines, CSV, TSV, Parquet.

A prompt is its words with single blanks between them, in Unicode NFC: blank ones are
skipped, and line breaks within quotes become blanks. Whatever is wrong with a file is
said in one line, with the place.
"""

import contextlib
import csv
import glob
import gzip
import json
import os
import pathlib
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

#: Characters of a line, or of a prompt; one that has more is a fault of the file.
LONGEST_LINE = 100_000

#: File names by kind; all but Parquet may end with ``.gz`` too.
KINDS = {
    ".txt": "text",
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "Parquet",
}

_PARQUET_ROWS = 4096


class PromptError(ValueError):
    """Prompts that cannot be had; the message says what to do about it."""


class Prompt(NamedTuple):
    """A prompt, and what it should not be.

    Attributes:
      text: words with single blanks between them.
      negative: the same, perhaps empty; None if the files have none.
    """

    text: str
    negative: str | None


# What a row says: the prompt and its negative; either may be missing.
_Row = tuple[str | None, str | None]


class _Columns(NamedTuple):
    prompt: str
    negative: str | None


def read_prompts(
    path: str | os.PathLike[str],
    *,
    column: str = "prompt",
    negative_column: str | None = None,
) -> Iterator[Prompt]:
    """Streams the prompts of one or more local files, in order.

    Args:
      path: a file, or a pattern of `glob` for files of one kind, which are taken in
        order of their names. The kind is that of the suffix: ``.txt`` (a prompt a
        line), ``.jsonl`` (an object a line), ``.csv`` and ``.tsv`` (with a header) or
        ``.parquet`` (needs pyarrow); ``.gz`` may follow, but for Parquet.
      column: where the prompts are; text files have no columns.
      negative_column: where the negative prompts are; None for none.

    Returns:
      An iterator, which raises `PromptError` too, once it comes to a fault.

    Raises:
      PromptError: there are no such files, they are of several kinds, or text files are
        to have negative prompts.
    """
    files = find_files(path)
    kind = _kind(files[0])
    if negative_column is not None and kind == "text":
        raise PromptError(
            f"{files[0]} is text and has no column {negative_column!r}; give CSV, TSV, "
            "JSON lines or Parquet for negative prompts, or leave out negative_column"
        )
    columns = _Columns(column, negative_column)
    return _read(files, _READERS[kind], columns)


def find_files(path: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The files of a path or pattern, sorted, at least one and of one kind.

    Raises:
      PromptError: there are none, or several kinds.
    """
    name = os.path.expanduser(os.fspath(path))
    if "://" in name:
        raise PromptError(
            f"{name} is an address; copy its files to a disk, and give their path"
        )
    if os.path.isdir(name):
        raise PromptError(
            f"{name} is a folder; give a file or a pattern, such as "
            f"{os.path.join(name, '*.txt')}"
        )
    if os.path.exists(name):
        found = [name]
    elif glob.has_magic(name):
        found = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        if not found:
            raise PromptError(f"no file matches the pattern {name}")
    else:
        raise PromptError(f"there is no file {name}")
    files = [pathlib.Path(file) for file in found]
    for file in files[1:]:
        if _kind(file) != _kind(files[0]):
            raise PromptError(
                f"{name} matches files of several kinds, such as {files[0]} and {file};"
                " give a pattern for one kind"
            )
    return files


def _kind(file: pathlib.Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = KINDS.get("".join(suffixes[:-1][-1:] if zipped else suffixes[-1:]))
    if kind is None or (zipped and kind == "Parquet"):
        raise PromptError(
            f"{file} is of no known kind; its name must end with one of "
            f"{', '.join(KINDS)}, or with .gz after it (not Parquet)"
        )
    return kind


def _read(
    files: list[pathlib.Path],
    rows: Callable[[pathlib.Path, _Columns], Iterator[_Row]],
    columns: _Columns,
) -> Iterator[Prompt]:
    found = False
    for file in files:
        with one_line_faults(file):
            for text, negative in rows(file, columns):
                if text := _normal(text):
                    found = True
                    wanted = columns.negative is not None
                    yield Prompt(text, _normal(negative) if wanted else None)
    if not found:
        names = str(files[0]) if len(files) == 1 else f"{files[0]} and the others"
        raise PromptError(f"there is no prompt in {names}; all are blank")


def _normal(text: str | None) -> str:
    words = " ".join((text or "").split())
    return words if words.isascii() else unicodedata.normalize("NFC", words)


@contextlib.contextmanager
def one_line_faults(file: pathlib.Path) -> Iterator[None]:
    """Turns what a file system or a zipped file raises into a `PromptError`."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise PromptError(f"{file} is no whole gzip file ({error})") from error
    except OSError as error:
        reason = str(error.strerror or error).splitlines()[0]
        raise PromptError(f"{file} cannot be read ({reason})") from error


def _lines(file: pathlib.Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers, never more than one in memory."""
    # UTF-8 takes 4 bytes a character at most; the line's end takes up to 2 more.
    most_bytes = 4 * LONGEST_LINE + 2
    zipped = file.suffix.lower() == ".gz"
    with gzip.open(file) if zipped else file.open("rb") as opened:
        number = 0
        while raw := opened.readline(most_bytes):
            number += 1
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                if len(raw) < most_bytes:
                    raise PromptError(
                        f"{file}, line {number}: byte {error.start + 1} of it is not "
                        "UTF-8; convert the file to UTF-8"
                    ) from error
                line = raw.decode("utf-8", "replace")
            _check_length(line.rstrip("\r\n"), f"{file}, line {number}")
            yield number, line


def _check_length(text: str, place: str) -> None:
    if len(text) > LONGEST_LINE:
        raise PromptError(
            f"{place}: it has more than {LONGEST_LINE} characters; is this a file of "
            "prompts?"
        )


def _text_rows(file: pathlib.Path, columns: _Columns) -> Iterator[_Row]:
    for _, line in _lines(file):
        yield line, None


def _json_rows(file: pathlib.Path, columns: _Columns) -> Iterator[_Row]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{place}: it is no JSON object") from error
        if not isinstance(fields, dict):
            raise PromptError(f"{place}: it is no JSON object")
        _check_columns(columns, list(fields), place)
        text = _checked(fields[columns.prompt], columns.prompt, place)
        negative = None
        if columns.negative is not None:
            negative = _checked(fields[columns.negative], columns.negative, place)
        yield text, negative


def _checked(value: Any, column: str, place: str) -> str | None:
    """A value that is text, all of which has a UTF-8 form, or missing."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise PromptError(
            f"{place}: {column!r} is {type(value).__name__}, not a string"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{place}: {column!r} has half of a surrogate pair, which is no character"
        ) from error
    return value


def _check_columns(columns: _Columns, present: list[str], place: str) -> None:
    for column in columns:
        if column is not None and column not in present:
            raise PromptError(
                f"{place}: there is no column {column!r}, only {', '.join(present)}"
            )


def _table_rows(
    file: pathlib.Path, columns: _Columns, delimiter: str
) -> Iterator[_Row]:
    lines = (line for _, line in _lines(file))
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(table, [])]
        if not header:
            return
        _check_columns(columns, header, f"{file}, line 1")
        prompt = header.index(columns.prompt)
        negative = None if columns.negative is None else header.index(columns.negative)
        for row in table:
            if not row:
                continue
            place = f"{file}, line {table.line_num}"
            if len(row) != len(header):
                raise PromptError(
                    f"{place}: it has {len(row)} fields, the header {len(header)}; "
                    "fields that hold the delimiter must be in double quotes"
                )
            _check_length(row[prompt], place)
            yield row[prompt], None if negative is None else row[negative]
    except csv.Error as error:
        raise PromptError(
            f"{file}, line {table.line_num}: it is no row of a table ({error}); is a "
            "double quote open?"
        ) from error


def _csv_rows(file: pathlib.Path, columns: _Columns) -> Iterator[_Row]:
    return _table_rows(file, columns, ",")


def _tsv_rows(file: pathlib.Path, columns: _Columns) -> Iterator[_Row]:
    return _table_rows(file, columns, "\t")


def _parquet_rows(file: pathlib.Path, columns: _Columns) -> Iterator[_Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise PromptError(
            f"{file} is Parquet, which needs one more package: pip install pyarrow"
        ) from error
    names = [name for name in columns if name is not None]
    try:
        with pyarrow.parquet.ParquetFile(file, memory_map=True) as table:
            _check_columns(columns, table.schema_arrow.names, str(file))
            number = 0
            for batch in table.iter_batches(_PARQUET_ROWS, columns=names):
                for fields in batch.select(names).to_pylist():
                    number += 1
                    place = f"{file}, row {number}"
                    for name in names:
                        _check_length(_checked(fields[name], name, place) or "", place)
                    negative = columns.negative
                    yield fields[columns.prompt], negative and fields[negative]
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise PromptError(f"{file} is no whole Parquet file ({reason})") from error


_READERS = {
    "text": _text_rows,
    "JSON lines": _json_rows,
    "CSV": _csv_rows,
    "TSV": _tsv_rows,
    "Parquet": _parquet_rows,
}
