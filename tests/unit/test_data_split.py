"""What is held out, and where a document is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.errors import DataError
from workers.data import split
from workers.data.split import DocumentKey, choose, line_boundary


@given(st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=40), st.floats(0.01, 0.49))
def test_both_parts_have_text_and_nothing_is_lost(contents: list[bytes], fraction: float) -> None:
    contents[0] += b"a cut\n is possible"
    chosen = choose([DocumentKey.of(content) for content in contents], fraction)
    parts = [chosen.divide(index, content) for index, content in enumerate(contents)]
    assert [train + held_out for train, held_out in parts] == contents
    total = sum(map(len, contents))
    train_bytes, held_out_bytes = (sum(len(part[side]) for part in parts) for side in (0, 1))
    assert train_bytes >= 1
    assert held_out_bytes >= 1
    assert held_out_bytes <= max(1, round(total * fraction)) + 50, "at most a line more than asked for"


def test_the_choice_does_not_depend_on_the_order_of_documents() -> None:
    contents = [bytes([index]) * 100 for index in range(100)]
    keys = [DocumentKey.of(content) for content in contents]
    held_out = choose(keys, 0.1).held_out
    backwards = choose(keys[::-1], 0.1).held_out
    assert 9 <= len(held_out) <= 10
    assert {99 - index for index in backwards} == held_out


@given(st.text(min_size=2), st.integers(), st.integers(0))
def test_a_cut_is_inside_and_never_in_a_character(text: str, near: int, after: int) -> None:
    document = ("中" + text + "文").encode()
    after %= len(document) - 4
    while document[after] & 0xC0 == 0x80:
        after -= 1
    cut = line_boundary(document, near, after)
    assert after < cut < len(document)
    document[after:cut].decode()
    document[cut:].decode()


@given(st.text(alphabet="a中\n", max_size=400), st.integers(4, 50))
def test_pieces_join_and_are_text(text: str, piece_bytes: int) -> None:
    before = split.PIECE_BYTES
    split.PIECE_BYTES = piece_bytes
    try:
        pieces = list(split.pieces(text.encode()))
    finally:
        split.PIECE_BYTES = before
    assert "".join(piece.decode() for piece in pieces) == text
    assert all(len(piece) <= 2 * piece_bytes for piece in pieces)
    assert all(pieces[:-1])


@pytest.mark.parametrize("documents", [[], [b"x"], ["中文".encode()]])
def test_too_little_text_to_divide_is_said(documents: list[bytes]) -> None:
    with pytest.raises(DataError, match="too few to hold a part out"):
        choose([DocumentKey.of(document) for document in documents], 0.1)
