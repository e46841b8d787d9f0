"""Files -> documents: what is taken, in which order, and how a bad file is named."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from ps.errors import DataError
from workers.data.source import STDLIB_MIN_BYTES, collect, documents


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_folder_is_searched_in_the_order_of_relative_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.jsonl", "a/deep/c.txt", "a-b.txt"):
        write(tmp_path / name, "x")
    for name in ("notes.md", ".hidden.txt", ".git/x.txt", "a/.cache/x.txt"):
        write(tmp_path / name, "x")
    write(tmp_path / "folder.txt" / "inner.txt", "x")
    names = [file.relative_to(tmp_path).as_posix() for file in collect([tmp_path])]
    assert names == ["a-b.txt", "a/deep/c.txt", "a/z.jsonl", "b.txt", "folder.txt/inner.txt"]


def test_a_hidden_folder_that_is_named_is_searched(tmp_path: Path) -> None:
    file = write(tmp_path / ".data" / "a.txt", "x")
    assert collect([tmp_path / ".data"]) == [file]


def test_paths_keep_the_order_that_they_are_given_in(tmp_path: Path) -> None:
    first, second = write(tmp_path / "z.txt", "1"), write(tmp_path / "a.txt", "2")
    assert list(documents(collect([first, second]))) == [b"1", b"2"]


def test_the_standard_library_is_over_10_mb_of_valid_text() -> None:
    files = collect(())
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = {part for file in files for part in file.relative_to(root).parts}
    assert sum(len(document) for document in documents(files)) >= STDLIB_MIN_BYTES
    assert files == sorted(files, key=lambda file: file.relative_to(root).as_posix())
    assert parts.isdisjoint({"site-packages", "dist-packages"})


def test_the_standard_librarys_tests_are_taken_where_there_is_little_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ast.py", "test/test_ast.py", "site-packages/torch.py"):
        write(tmp_path / name, "pass\n")
    write(tmp_path / "latin.py", b"# caf\xe9\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [file.name for file in collect(())] == ["ast.py", "test_ast.py"]


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        collect([tmp_path / "nowhere.txt"])


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"book\.pdf is neither"):
        collect([write(tmp_path / "book.pdf", "x")])


def test_a_folder_without_usable_files_is_named(tmp_path: Path) -> None:
    write(tmp_path / "readme.md", "x")
    with pytest.raises(DataError, match=f"no .txt or .jsonl file in {tmp_path}"):
        collect([tmp_path])


def test_json_lines_are_a_document_each(tmp_path: Path) -> None:
    lines = ['{"text": "one", "id": 1}', "", '{"text": ""}', '{"text": "two\\nlines \\u4e2d"}\r']
    file = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + "\n".join(lines).encode())
    assert list(documents([file])) == [b"one", "two\nlines 中".encode()]


def test_text_is_kept_byte_for_byte(tmp_path: Path) -> None:
    content = "\ufeffa\r\n\r\n  b\x00<|endoftext|>\n".encode()
    assert list(documents([write(tmp_path / "a.txt", content), write(tmp_path / "empty.txt", "")])) == [content]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff\n", r"a\.txt: not valid UTF-8 at byte offset 3"),
        ("a.txt", "中".encode()[:2], r"a\.txt: not valid UTF-8 at byte offset 0"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl: not valid UTF-8 at byte offset 24"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b'{"content": "a"}\n', r'a\.jsonl, line 1: not an object with the field "text"'),
        ("a.jsonl", b'"text"\n', r'a\.jsonl, line 1: not an object with the field "text"'),
        ("a.jsonl", b'{"text": 3}\n', r'a\.jsonl, line 1: the field "text" is a int'),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: a lone surrogate"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not valid JSON"),
    ],
)
def test_bad_content_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(documents([write(tmp_path / name, content)]))


def test_json_survives_what_json_dumps_writes(tmp_path: Path) -> None:
    texts = ["a\u2028b", "\x85", "中文", "tab\t"]
    content = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    assert list(documents([write(tmp_path / "a.jsonl", content)])) == [text.encode() for text in texts]
