"""Bound a request's input tokens from above, without a tokenizer. Pure. D8

A byte-level BPE starts from single bytes and only ever merges, and a SentencePiece vocabulary falls back
to single bytes, so neither makes more tokens than the text has UTF-8 bytes. Some tokenizers apply NFKC
first, which turns one three-byte character into as many as 33 bytes: whoever controls a file that the
agent reads could use that to exceed a bound on the plain text, so the longer of both forms counts.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from sandbox.models.decoding import clean_text

FIXED_TOKENS = 2_048
"""What a provider adds unseen: its tool-use prompt (several hundred tokens) and the template's own text."""
TOKENS_PER_MESSAGE = 32
"""Role markers, separators and the wrapper of a tool result, beyond the keys counted as bytes already."""
TOKENS_PER_TOOL = 128
"""The text that a template puts around one tool's schema."""


def token_bound(body: dict[str, Any], *, messages: int, tools: int) -> int:
    """Return an upper bound of the tokens that a serialised request body can become.

    The whole body counts, keys and braces included, indented: templates that print a schema again may
    do so with line breaks. ``messages`` and ``tools`` are their numbers.
    """
    text = clean_text(json.dumps(body, ensure_ascii=False, indent=1))
    # Go's JSON encoder, which Ollama's templates use, writes each of these as six characters.
    escapes = 5 * sum(text.count(char) for char in "<>&\u2028\u2029")
    size = max(len(text.encode()), len(unicodedata.normalize("NFKC", text).encode()))
    return size + escapes + FIXED_TOKENS + messages * TOKENS_PER_MESSAGE + tools * TOKENS_PER_TOOL
