"""Which text a job trains on: files -> documents, in an order that every machine agrees on.

A document is the whole of a .txt (or, for the standard library, .py) file, or one line of a .jsonl file.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ps.errors import DataError

#: What a folder is searched for.
SUFFIXES = (".txt", ".jsonl")
#: The standard library gives at least this many bytes of text.
STDLIB_MIN_BYTES = 10 << 20
_BOM = b"\xef\xbb\xbf"
_PACKAGES = {"site-packages", "dist-packages"}
_TEST_SUITES = {"test", "tests", "idle_test"}


def collect(paths: Sequence[Path]) -> list[Path]:
    """List the files of a corpus, those of a folder ordered by their path relative to it.

    Args:
        paths: Files and folders, in the order given. Empty: the source of the Python standard library.

    Raises:
        DataError: a path is missing, is of another kind, or there is no usable file.
    """
    if not paths:
        return _standard_library()
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files.extend(_in_folder(path))
        elif not path.exists():
            raise DataError(f"data.paths: {path} does not exist")
        elif path.suffix not in SUFFIXES:
            raise DataError(f"data.paths: {path} is neither a folder nor a {' or '.join(SUFFIXES)} file")
        else:
            files.append(path)
    if not files:
        raise DataError(f"data.paths: no {' or '.join(SUFFIXES)} file in {', '.join(str(path) for path in paths)}")
    return files


def documents(files: Iterable[Path]) -> Iterator[bytes]:
    """Read the documents of the files, in order: valid UTF-8, never empty.

    Raises:
        DataError: names the file and the byte offset or the line number.
    """
    for path in files:
        content = read(path)
        if path.suffix == ".jsonl":
            yield from _json_lines(path, content)
        else:
            _check_utf8(path, content)
            if content:
                yield content


def read(path: Path) -> bytes:
    """Read a file of the corpus whole."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _in_folder(folder: Path) -> list[Path]:
    found = [
        file
        for file in folder.rglob("*")
        if file.suffix in SUFFIXES and not _hidden(file.relative_to(folder)) and file.is_file()
    ]
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _standard_library() -> list[Path]:
    """The library's modules; its own test suite only where there is too little text without it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file
        for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix())
        if _PACKAGES.isdisjoint(file.relative_to(root).parts) and file.is_file() and _is_utf8(file)
    ]
    modules = [file for file in files if _TEST_SUITES.isdisjoint(file.relative_to(root).parts)]
    chosen = modules if _total_bytes(modules) >= STDLIB_MIN_BYTES else files
    if _total_bytes(chosen) == 0:
        raise DataError(f"no source of the Python standard library in {root}; name your text in data.paths")
    return chosen


def _total_bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _is_utf8(path: Path) -> bool:
    try:
        read(path).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _check_utf8(path: Path, content: bytes, offset: int = 0) -> None:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not valid UTF-8 at byte offset {offset + error.start}: {error.reason}; "
            "convert the file to UTF-8 or leave it out"
        ) from None


def _json_lines(path: Path, content: bytes) -> Iterator[bytes]:
    offset = len(_BOM) if content.startswith(_BOM) else 0
    for number, line in enumerate(content[offset:].split(b"\n"), start=1):
        _check_utf8(path, line, offset)
        offset += len(line) + 1
        if not line.strip():
            continue
        text = _text_field(f"{path}, line {number}", line)
        if text:
            yield text


def _text_field(where: str, line: bytes) -> bytes:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(record, dict) or "text" not in record:
        raise DataError(f'{where}: not an object with the field "text"')
    text = record["text"]
    if not isinstance(text, str):
        raise DataError(f'{where}: the field "text" is a {type(text).__name__}, not a string')
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: a lone surrogate at character {error.start} is not text") from None
