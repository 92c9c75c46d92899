"""Prompts to token ids, from the tokeniser files of a checkpoint's own folder.

Needs only the ``tokenizers`` library, and gives the ids that transformers' CLIP and T5 tokenisers give with
``padding="max_length", truncation=True``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from converters.errors import CheckpointError

# The roles of special tokens and, where a folder does not name them, the tokens of the published models.
_CLIP_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
_T5_TOKENS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

# CLIP splits text into special tokens, English contractions, words, single digits and runs of anything else.
_CLIP_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Whatever a damaged tokeniser makes the library do, as an error about files; it may panic, which is no Exception.

    Raises:
        CheckpointError: for anything but an interruption.
    """
    try:
        yield
    except (CheckpointError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CheckpointError(f"{what} ({str(error)[:200] or type(error).__name__}); download it again") from error
        raise


class TextTokenizer:
    """Prompts to ids of one fixed length.

    Attributes:
        length: tokens per prompt, special tokens and padding included.
        pad_id: id of the padding.
        vocab_size: ids are below it; an encoder needs at least as many rows in its token table.
    """

    def __init__(self, tokenizer: Tokenizer, *, length: int, pad_token: str, unknown_token: str):
        special = tokenizer.num_special_tokens_to_add(is_pair=False)
        if length <= special:
            raise ValueError(f"length {length}: {special} special tokens leave no room for text")
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length=length)
        self._tokenizer = tokenizer
        self._unknown_token = unknown_token
        self._unknown_id = tokenizer.token_to_id(unknown_token)
        self.length = length
        self.pad_id = tokenizer.token_to_id(pad_token)
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Ids, int32 [B, length]: special tokens added, cut at the end, padded at the end.

        Raises:
            TypeError: if ``prompts`` is not a sequence of strings.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"prompts must be a list of strings, got {prompts!r}")
        ids = np.full((len(prompts), self.length), self.pad_id, np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            tokens = self._encode(prompt).ids
            row[: len(tokens)] = tokens
        return ids

    def _encode(self, prompt: str, **options: Any) -> Any:
        with refused("the tokeniser cannot split a prompt"):
            return self._tokenizer.encode(prompt, **options)

    def truncated(self, prompt: str) -> str | None:
        """The end of the prompt that did not fit, or None if all of it did."""
        overflow = self._encode(prompt).overflowing
        if not overflow or 0 not in overflow[0].special_tokens_mask:
            return None
        first = overflow[0]
        start = first.offsets[first.special_tokens_mask.index(0)][0]
        return prompt[start:].strip()

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of the prompt, each once and in order, that hold something the vocabulary cannot express.

        Only the part that fits is looked at.  Byte-level vocabularies such as the published CLIP's express
        everything, so they give an empty list.
        """
        encoding = self._encode(prompt, add_special_tokens=False)
        words: dict[str, None] = {}
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            # CLIP's unknown token is its end token: written out in the prompt it is known.
            if token != self._unknown_id or prompt[start:end].strip() == self._unknown_token:
                continue
            while start < end and prompt[start].isspace():
                start += 1
            while start > 0 and not prompt[start - 1].isspace():
                start -= 1
            while end < len(prompt) and not prompt[end].isspace():
                end += 1
            words.update(dict.fromkeys(prompt[start:end].split()))
        return list(words)


def load_clip_tokenizer(folder: str | Path, length: int = 77) -> TextTokenizer:
    """CLIP's tokeniser from ``tokenizer.json``, or from ``vocab.json`` and ``merges.txt``.

    Args:
        folder: a checkpoint's tokeniser folder (FLUX.1: ``tokenizer``).
        length: tokens per prompt.

    Raises:
        CheckpointError: if files are missing, damaged, or do not make a CLIP tokeniser.
        ValueError: if ``length`` leaves no room for text.
    """
    folder = _existing(folder)
    with refused(f"{folder}: no tokeniser that can be used"):
        named, added = _special_tokens(folder, _CLIP_TOKENS)
        if (folder / "tokenizer.json").is_file():
            tokenizer = _from_json(folder / "tokenizer.json")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer = _clip_from_vocabulary(folder, named["unk_token"].content)
        else:
            raise CheckpointError(
                f"{folder}: no CLIP tokeniser; expected tokenizer.json, or vocab.json with merges.txt; "
                "copy them from the checkpoint's 'tokenizer' folder"
            )
        _add(tokenizer, named, added)
        bos, eos = (tokenizer.token_to_id(named[role].content) for role in ("bos_token", "eos_token"))
        if tokenizer.post_processor is None:
            tokenizer.post_processor = processors.RobertaProcessing(
                (named["eos_token"].content, eos),
                (named["bos_token"].content, bos),
                trim_offsets=False,
                add_prefix_space=False,
            )
        _check(tokenizer, folder, [bos, eos], named)
    return _of_length(tokenizer, named, length)


def load_t5_tokenizer(folder: str | Path, length: int) -> TextTokenizer:
    """T5's tokeniser from ``tokenizer.json``.

    Args:
        folder: a checkpoint's tokeniser folder (FLUX.1: ``tokenizer_2``).
        length: tokens per prompt (FLUX.1: 512 dev, 256 schnell).

    Raises:
        CheckpointError: if files are missing, damaged, or do not make a T5 tokeniser.
        ValueError: if ``length`` leaves no room for text.
    """
    folder = _existing(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        only_model = (folder / "spiece.model").is_file()
        raise CheckpointError(
            f"{folder}: no tokenizer.json"
            + (
                ", only spiece.model; convert it once, where transformers and sentencepiece are installed: "
                f"transformers.T5TokenizerFast.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
                if only_model
                else "; copy it from the checkpoint's 'tokenizer_2' folder"
            )
        )
    with refused(f"{folder}: no tokeniser that can be used"):
        named, added = _special_tokens(folder, _T5_TOKENS)
        tokenizer = _from_json(path)
        _add(tokenizer, named, added)
        _check(tokenizer, folder, [tokenizer.token_to_id(named["eos_token"].content)], named)
    return _of_length(tokenizer, named, length)


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a checkpoint's tokeniser folder")
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _from_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: not a tokeniser file ({error}); download it again") from error


def _clip_from_vocabulary(folder: Path, unknown_token: str) -> Tokenizer:
    """Byte-level BPE with CLIP's clean-up: NFC, runs of whitespace to one space, lower case."""
    try:
        model = BPE.from_file(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            unk_token=unknown_token,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{folder}: vocab.json and merges.txt do not make a vocabulary ({error}); download them again"
        ) from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def _token(value: Any, path: Path) -> AddedToken:
    """A token as settings write it: its text, or an object with its text and flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise CheckpointError(f"{path}: special token {value!r}, expected a string or an object with 'content'")
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(value["content"], **{flag: value[flag] for flag in flags if flag in value})


def _special_tokens(folder: Path, defaults: Mapping[str, str]) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Special tokens by role, and all tokens the folder's settings add to the vocabulary, in order of their ids.

    ``special_tokens_map.json`` and ``added_tokens.json`` count only where ``tokenizer_config.json`` is of the old
    kind that does not list the added tokens itself.
    """
    path = folder / "tokenizer_config.json"
    config = _read_json(path)
    listed = config.get("added_tokens_decoder")
    mapped = _read_json(folder / "special_tokens_map.json") if listed is None else {}
    named = {role: _token(mapped.get(role) or config.get(role) or token, path) for role, token in defaults.items()}
    if listed is None:
        contents = {token.content for token in named.values()}
        legacy = _read_json(folder / "added_tokens.json")
        added = [
            AddedToken(token, normalized=token not in contents, special=token in contents)
            for token in sorted(legacy, key=legacy.get)
        ]
    elif isinstance(listed, Mapping) and all(index.isdecimal() for index in listed):
        added = [_token(listed[index], path) for index in sorted(listed, key=int)]
    else:
        raise CheckpointError(f"{path}: added_tokens_decoder must map ids to tokens, got {listed!r}")
    by_content = {token.content: token for token in added}
    return {role: by_content.get(token.content, token) for role, token in named.items()}, added


def _add(tokenizer: Tokenizer, named: Mapping[str, AddedToken], added: Sequence[AddedToken]) -> None:
    """Make the vocabulary recognise the special tokens inside a prompt, if it does not already."""
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in [*added, *named.values()]:
        if token.content not in present:
            present.add(token.content)
            tokenizer.add_tokens([token])


def _check(tokenizer: Tokenizer, folder: Path, frame: list[int], named: Mapping[str, AddedToken]) -> None:
    """Refuses a tokeniser that does not frame an empty prompt as this kind of encoder expects."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    empty = tokenizer.encode("").ids
    if empty != frame:
        raise CheckpointError(
            f"{folder}: the tokeniser turns an empty prompt into {empty}, expected {frame}; "
            "it is of another kind of text encoder"
        )
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary or max(vocabulary.values()) >= 2**31 or named["pad_token"].content not in vocabulary:
        raise CheckpointError(
            f"{folder}: its vocabulary lacks the padding {named['pad_token'].content!r}, or is broken"
        )


def _of_length(tokenizer: Tokenizer, named: Mapping[str, AddedToken], length: int) -> TextTokenizer:
    return TextTokenizer(
        tokenizer,
        length=length,
        pad_token=named["pad_token"].content,
        unknown_token=named["unk_token"].content,
    )
