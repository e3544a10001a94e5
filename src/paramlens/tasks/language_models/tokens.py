"""The text of tokens, and the tokens that spell given words.

Vocabularies write bytes in two ways that are not plain text. Byte-level vocabularies replace every byte by a printable letter ("Ã©" for
"é"). Byte-fallback vocabularies use tokens like <0xC3> for the bytes of a character that they lack.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from operator import and_, eq
from typing import Any

from paramlens.errors import ConfigError

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
STAND_INS = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
"""Letter → the byte that it stands for in every byte-level vocabulary."""

_ASCII = str.maketrans({letter: chr(byte) for letter, byte in STAND_INS.items() if byte < 0x80})

_PROBE = "\U0010fffd"
"""A character that no vocabulary has, so that it is spelled by its bytes."""

_BYTE = re.compile("<0x([0-9A-F]{2})>")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, with the space before a word if it belongs to the token.

    A token that is only a part of a character is shown as bytes like <0xE6>. An unknown id is shown as <id>.
    """
    byte_level, fallback = _spells_bytes(tokenizer)
    added = set(tokenizer.get_added_vocab())

    def text(number: int, token: str | None) -> str:
        if token is None:
            return f"<{number}>"
        if token in added:
            return token
        if byte_level:
            plain = token.translate(_ASCII)
            spelled = not plain.isascii() and all(letter in STAND_INS for letter in token)
            return _readable(bytes(STAND_INS[letter] for letter in token)) if spelled else plain
        byte = _BYTE.fullmatch(token) if fallback else None
        return _readable(bytes([int(byte[1], 16)])) if byte else token.replace("▁", " ")

    return [text(*each) for each in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True)]


@lru_cache(maxsize=8)
def _spells_bytes(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the vocabulary is byte-level, and whether it has byte fallback. Found by encoding and decoding a rare character."""
    encoded = _PROBE.encode()
    letters = [next(letter for letter, byte in STAND_INS.items() if byte == each) for each in encoded]
    numbers = [f"<0x{each:02X}>" for each in encoded]
    spelled = "".join(tokenizer.tokenize(_PROBE))
    byte_level, fallback = (
        spelled.endswith("".join(pieces)) or _PROBE in tokenizer.convert_tokens_to_string(pieces) for pieces in (letters, numbers)
    )
    return byte_level, fallback


def _readable(raw: bytes) -> str:
    """Bytes as text. A byte that is not part of a complete character is written like <0xE6>."""
    text = raw.decode(errors="surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda found: f"<0x{ord(found[0]) - 0xDC00:02X}>", text)


def positions_of(tokenizer: Any, text: str, words: str) -> list[int]:
    """Positions of the tokens of `text` that spell the first occurrence of `words`, or any part of it.

    Raises `ConfigError` if `words` are not in `text`.
    """
    wanted = words.strip()
    if not wanted or wanted not in text:
        raise ConfigError(f"{words!r}: not in {text.strip()!r}")
    texts = token_texts(tokenizer, list(tokenizer(text)["input_ids"]))
    for spans, start, end in _spans(tokenizer, text, wanted):
        found = [i for i, (first, last) in enumerate(spans) if first < last and first < end and last > start]
        while found and not texts[found[0]].strip():  # a space before the words
            found.pop(0)
        if found:
            return found
    raise ConfigError(f"{words!r}: the tokenizer does not tell which tokens of {text.strip()!r} spell it")


def _spans(tokenizer: Any, text: str, wanted: str) -> Iterator[tuple[list[tuple[int, int]], int, int]]:
    """Start and end of each token of `text`, then of `wanted`: first by the tokenizer's offsets, then in the decoded text."""
    if getattr(tokenizer, "is_fast", False):
        at = text.index(wanted)
        yield _one_by_one(text, tokenizer(text, return_offsets_mapping=True)["offset_mapping"]), at, at + len(wanted)
    ids = list(tokenizer(text)["input_ids"])
    decoded = [tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False) for count in range(1, len(ids) + 1)]
    spans, known = list[tuple[int, int]](), 0
    for so_far in decoded:
        before, known = known, max(known, sum(accumulate(map(eq, so_far, decoded[-1]), and_)))
        spans.append((before, max(known, before + 1)))  # an incomplete character also belongs to the next token
    letters, places = _folded(decoded[-1] if decoded else "")
    within, _ = _folded(wanted)
    at = letters.find(within)
    if within and at >= 0:
        yield spans, places[at], places[at + len(within) - 1] + 1


def _one_by_one(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets in which a token of one byte has the span of its own character. Some tokenizers give it the span of several."""
    spans: list[tuple[int, int]] = []
    for (start, end), run in groupby(map(tuple, offsets)):
        count = len(list(run))
        owners = [i for i in range(start, end) for _ in text[i].encode()]
        spans += [(i, i + 1) for i in owners] if len(owners) == count > 1 else [(start, end)] * count
    return spans


def _folded(text: str) -> tuple[str, list[int]]:
    """A text in lower case without accents and spaces, which tokenizers may drop, and the place in `text` of each letter left."""
    kept = [
        (letter, i)
        for i, character in enumerate(text)
        for letter in unicodedata.normalize("NFKD", character.lower())
        if not unicodedata.combining(letter) and not letter.isspace()
    ]
    return "".join(letter for letter, _ in kept), [i for _, i in kept]


def open_ended(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that will be continued, without the token that some tokenizers add at the end of every text."""
    found = tokenizer(text, return_special_tokens_mask=True)
    ids, special = list(found["input_ids"]), list(found["special_tokens_mask"])
    end = max((i + 1 for i, each in enumerate(special) if not each), default=len(ids))
    return ids[:end]
