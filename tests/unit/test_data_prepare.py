"""Tokenizing: exact, deterministic, cached by content, prepared once, and repaired when damaged."""

from __future__ import annotations

import fcntl
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from ps.errors import DataError, StartupError
from workers.config import DataConfig
from workers.data import bpe, split
from workers.data.prepare import PreparedData, prepare
from workers.data.source import collect, documents

CHINESE = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏"


def english(num_lines: int, seed: int = 0) -> str:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "nobody", "reads"]
    chance = random.Random(seed)
    return "".join(" ".join(chance.choices(words, k=8)) + ".\n" for _ in range(num_lines))


def chinese(num_lines: int) -> str:
    chance = random.Random(1)
    return "".join("".join(chance.choices(CHINESE, k=20)) + "。\n" for _ in range(num_lines))


def config(tmp_path: Path, **changes: object) -> DataConfig:
    values = {
        "paths": (tmp_path / "text",),
        "cache_dir": tmp_path / "cache",
        "vocab_size": 300,
        "sequence_length": 16,
        "validation_fraction": 0.1,
    }
    return DataConfig.model_validate(values | changes)


def corpus(tmp_path: Path, files: dict[str, str]) -> None:
    folder = tmp_path / "text"
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())


def decoded(prepared: PreparedData) -> tuple[list[str], list[str]]:
    """The documents of the training and of the held-out part."""
    tokenizer = prepared.tokenizer()
    end = tokenizer.token_to_id(bpe.END_OF_TEXT)
    parts = []
    for tokens in (prepared.train(), prepared.validation()):
        pieces = np.split(np.asarray(tokens), np.flatnonzero(tokens == end) + 1)
        assert len(pieces[-1]) == 0, "every document ends with the special token"
        parts.append([tokenizer.decode(piece[:-1].tolist()) for piece in pieces[:-1]])
    return parts[0], parts[1]


def test_whole_documents_are_held_out_and_come_back_exactly(tmp_path: Path) -> None:
    files = {f"{index:02}.txt": english(20, seed=index) for index in range(40)}
    corpus(tmp_path, files)
    prepared = prepare(config(tmp_path))
    train, held_out = decoded(prepared)
    assert sorted(train + held_out) == sorted(files.values())
    assert [text for text in files.values() if text in set(train)] == train
    total = sum(len(text) for text in files.values())
    assert prepared.validation_bytes == sum(len(text.encode()) for text in held_out)
    assert 0.05 * total <= prepared.validation_bytes <= 0.1 * total
    assert prepared.vocab_size == prepared.tokenizer().get_vocab_size() == 300
    assert prepared.dtype == "uint16"
    assert (prepared.train_tokens, prepared.validation_tokens) == (
        len(prepared.train()),
        len(prepared.validation()),
    )
    sidecar = json.loads((prepared.folder / "data.json").read_text())
    assert (sidecar["train_documents"], sidecar["validation_documents"]) == (len(train), len(held_out))
    assert sidecar["train_bytes"] + sidecar["validation_bytes"] == total


def test_one_document_is_cut_at_a_line(tmp_path: Path) -> None:
    text = english(300)
    corpus(tmp_path, {"book.txt": text})
    (train,), (held_out,) = decoded(prepare(config(tmp_path)))
    assert train + held_out == text
    assert train.endswith("\n")
    assert 0.09 <= len(held_out) / len(text) <= 0.11


def test_chinese_is_text_like_any_other(tmp_path: Path) -> None:
    text = chinese(400)
    corpus(tmp_path, {"a.txt": text})
    prepared = prepare(config(tmp_path, vocab_size=400))
    (train,), (held_out,) = decoded(prepared)
    assert train + held_out == text
    assert prepared.validation_bytes == len(held_out.encode())
    assert any(len(prepared.tokenizer().decode([token])) > 1 for token in range(257, 400)), "no merge learnt"


def test_text_that_looks_like_the_special_token_is_text(tmp_path: Path) -> None:
    text = "a <|endoftext|> b\n" * 200
    corpus(tmp_path, {"a.txt": text})
    prepared = prepare(config(tmp_path))
    tokens = np.concatenate([prepared.train(), prepared.validation()])
    assert (tokens == prepared.tokenizer().token_to_id(bpe.END_OF_TEXT)).sum() == 2
    assert prepared.token_bytes()[tokens].sum() == len(text)


def test_token_bytes_add_up(tmp_path: Path) -> None:
    corpus(tmp_path, {"a.txt": english(100) + chinese(100), "b.txt": "\x00\r\n\t\u00a0 🎈" * 50})
    prepared = prepare(config(tmp_path))
    assert prepared.token_bytes()[prepared.validation()].sum() == prepared.validation_bytes


def test_a_large_document_is_encoded_in_pieces_that_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "PIECE_BYTES", 100)
    monkeypatch.setattr(bpe, "_BATCH_BYTES", 1000)
    text = english(50) + "无换行" * 500 + english(50)
    corpus(tmp_path, {"a.txt": text})
    (train,), (held_out,) = decoded(prepare(config(tmp_path)))
    assert train + held_out == text


def test_the_result_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    corpus(tmp_path, {f"{index}.txt": english(200, seed=index) + chinese(50) for index in range(10)})
    script = (
        "import sys; from pathlib import Path; from workers.config import DataConfig; "
        "from workers.data.prepare import prepare; "
        "print(prepare(DataConfig(paths=(Path(sys.argv[1]),), vocab_size=500, sequence_length=16,"
        "validation_fraction=0.1, cache_dir=Path(sys.argv[2]))).digest)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "text"), str(tmp_path / f"cache{threads}")],
            env={**os.environ, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "3")
    }
    assert len(digests) == 1


def test_the_cache_is_by_content(tmp_path: Path) -> None:
    corpus(tmp_path, {"a.txt": english(300)})
    messages: list[str] = []
    first = prepare(config(tmp_path), messages.append)
    assert len(messages) == 2
    again = prepare(config(tmp_path), messages.append)
    assert again == first
    assert len(messages) == 2, "the second time nothing is to be done"
    (tmp_path / "text" / "a.txt").rename(tmp_path / "text" / "renamed.txt")
    assert prepare(config(tmp_path)).folder == first.folder
    assert prepare(config(tmp_path, sequence_length=32)).folder == first.folder
    assert prepare(config(tmp_path, vocab_size=301)).folder != first.folder
    assert prepare(config(tmp_path, validation_fraction=0.2)).folder != first.folder
    corpus(tmp_path, {"renamed.txt": english(301)})
    changed = prepare(config(tmp_path))
    assert changed.folder != first.folder
    assert changed.digest != first.digest


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "tokenizer.json", "data.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, name: str, damage: str) -> None:
    corpus(tmp_path, {"a.txt": english(300)})
    first = prepare(config(tmp_path))
    path = first.folder / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    messages: list[str] = []
    assert prepare(config(tmp_path), messages.append) == first
    assert messages, "the damage was not seen"
    assert decoded(first)


def test_what_a_killed_preparer_left_is_cleared(tmp_path: Path) -> None:
    corpus(tmp_path, {"a.txt": english(300)})
    folder = prepare(config(tmp_path)).folder
    folder.rename(folder.with_name(folder.name + ".tmp"))
    (folder.with_name(folder.name + ".tmp") / "train.bin").write_bytes(b"half")
    assert prepare(config(tmp_path)).folder == folder
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, folder.name + ".lock"]


def test_one_process_prepares_and_the_others_wait(tmp_path: Path) -> None:
    corpus(tmp_path, {"a.txt": english(300)})
    finished = prepare(config(tmp_path))
    aside = tmp_path / "aside"
    finished.folder.rename(aside)
    waiting, messages, results = threading.Event(), [], []

    def listen(message: str) -> None:
        messages.append(message)
        waiting.set()

    thread = threading.Thread(target=lambda: results.append(prepare(config(tmp_path), listen)))
    with finished.folder.with_name(finished.folder.name + ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread.start()
        assert waiting.wait(timeout=30)
        aside.rename(finished.folder)
    thread.join(timeout=30)
    assert results == [finished]
    assert messages == ["waiting for another process that prepares the same text"]


def test_a_failed_preparation_leaves_nothing(tmp_path: Path) -> None:
    corpus(tmp_path, {"a.txt": "x"})
    with pytest.raises(DataError, match="too few to hold a part out"):
        prepare(config(tmp_path))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (
            "short text\n" * 4,
            {"sequence_length": 64},
            "training part has .* data.sequence_length=64 needs 65",
        ),
        (
            "some longer text\n" * 60,
            {"validation_fraction": 0.01},
            r"held-out part has .* data\.validation_fraction=0\.01",
        ),
        ("", {}, "0 bytes of text are too few"),
    ],
)
def test_too_little_text_is_said(tmp_path: Path, text: str, changes: dict[str, object], message: str) -> None:
    corpus(tmp_path, {"a.txt": text})
    with pytest.raises(DataError, match=message):
        prepare(config(tmp_path, **changes))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    corpus(tmp_path, {"a.txt": english(300)})
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(StartupError, match=r"data\.cache_dir=.*cache cannot be written"):
        prepare(config(tmp_path))


def test_a_text_with_few_words_gives_a_small_vocabulary(tmp_path: Path) -> None:
    corpus(tmp_path, {"a.txt": "ab\n" * 400})
    prepared = prepare(config(tmp_path, vocab_size=1000))
    assert 257 <= prepared.vocab_size < 300
    assert len(prepared.token_bytes()) == prepared.vocab_size


def test_wide_vocabularies_get_wide_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    corpus(tmp_path, {"a.txt": "wide\n"})
    tokenizer = bpe.train(documents(collect([tmp_path / "text"])), 5, 300)
    with path.open("wb") as file:
        encoder = bpe.Encoder(tokenizer, file, "uint32")
        encoder.add(b"wide\n")
        encoder.flush()
    assert path.stat().st_size == 4 * encoder.num_tokens


def test_importing_the_data_package_costs_no_torch_and_no_tokenizers() -> None:
    script = (
        "import sys, workers.data.prepare, workers.data.batches, workers.data.sampling; "
        "sys.exit(bool({'torch', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
