"""The tokenisers of `nano`: small vocabularies in the file formats of T5 and CLIP.

Every word of a grammar is one token for both, whatever its case; to T5 any other word is unknown, which is how a
prompt is found to contain it.  transformers and `sega_jax.models.tokenize` read the same files and give the same ids.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

T5_LENGTH = 16  # the longest caption has 15
CLIP_LENGTH = 77

_SPACE = "▁"
_T5_SPECIAL = ("<pad>", "</s>", "<unk>")
_CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_PUNCTUATION = (",", ".", ";", ":", "!", "?", "-", "'")
_SCORE = -2.0  # log-probability; all alike, since no text can be split in two ways


def t5_pieces(words: Sequence[str]) -> list[tuple[str, float]]:
    """Pieces of the T5 vocabulary with their scores; the index is the id."""
    pieces = [(token, 0.0) for token in _T5_SPECIAL]
    pieces += [(_SPACE + word, _SCORE) for word in words]
    pieces += [(mark, _SCORE) for mark in (*_PUNCTUATION, _SPACE)]
    return pieces + [(_SPACE + word.capitalize(), _SCORE) for word in words]


def t5_aliases(words: Sequence[str]) -> tuple[list[int], list[int]]:
    """Ids of capitalised words, and of the same words in lower case, whose embeddings they share.

    transformers ignores a normaliser in a T5 tokeniser file, so case has to be folded here.
    """
    ids = {piece: i for i, (piece, _) in enumerate(t5_pieces(words))}
    return [ids[_SPACE + word.capitalize()] for word in words], [ids[_SPACE + word] for word in words]


def write_t5(folder: Path, words: Sequence[str]) -> None:
    """``tokenizer.json`` (Unigram) and ``tokenizer_config.json`` of the T5 tokeniser."""
    tokenizer = Tokenizer(models.Unigram(t5_pieces(words), unk_id=_T5_SPECIAL.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    end = _T5_SPECIAL.index("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", end)]
    )
    tokenizer.add_special_tokens(list(_T5_SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "T5TokenizerFast",
        "model_max_length": T5_LENGTH,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": 0,
        "additional_special_tokens": [],
        "added_tokens_decoder": {str(i): _added(token) for i, token in enumerate(_T5_SPECIAL)},
    }
    _write(folder / "tokenizer_config.json", settings)


def _added(token: str) -> dict[str, object]:
    return {
        "content": token,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make every word one token: the most frequent pair first, ties by spelling.

    The trainer of the tokenizers library breaks ties by hash order, so its ids change from run to run.
    """
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while True:
        counts = Counter(pair for symbols in split for pair in itertools.pairwise(symbols))
        if not counts:
            return merges
        left, right = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append((left, right))
        for symbols in split:
            at = 0
            while at < len(symbols) - 1:
                if (symbols[at], symbols[at + 1]) == (left, right):
                    symbols[at : at + 2] = [left + right]
                at += 1


@functools.cache
def clip_tables(words: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of the CLIP tokeniser: bytes, bytes that end a word, merges up to whole words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(words)
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    return {token: i for i, token in enumerate([*tokens, *_CLIP_SPECIAL])}, merges


def write_clip(folder: Path, words: Sequence[str]) -> None:
    """``vocab.json``, ``merges.txt`` and ``tokenizer_config.json`` of the CLIP tokeniser."""
    vocabulary, merges = clip_tables(tuple(words))
    start, end = (vocabulary[token] for token in _CLIP_SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CLIP_LENGTH,
        "do_lower_case": True,
        "bos_token": _CLIP_SPECIAL[0],
        "eos_token": _CLIP_SPECIAL[1],
        "unk_token": _CLIP_SPECIAL[1],
        "pad_token": _CLIP_SPECIAL[1],
        "added_tokens_decoder": {str(i): _added(token) for i, token in zip((start, end), _CLIP_SPECIAL, strict=True)},
    }
    _write(folder / "tokenizer_config.json", settings)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
