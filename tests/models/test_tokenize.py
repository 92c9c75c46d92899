import json

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import Unigram, WordLevel

from converters.errors import CheckpointError
from sega_jax.models.tokenize import load_clip_tokenizer, load_t5_tokenizer

WORDS = ["a", "red", "circle"]
START, END = "<|startoftext|>", "<|endoftext|>"


def write_clip(folder, merges):
    """Letters, letters ending a word, merges, specials; nothing else is in the vocabulary."""
    letters = sorted(set("".join(WORDS)))
    vocab = [*letters, *(letter + "</w>" for letter in letters), *("".join(m.split()) for m in merges), START, END]
    vocab = {token: i for i, token in enumerate(vocab)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return vocab


@pytest.fixture
def clip(tmp_path):
    return tmp_path, write_clip(tmp_path, ["r e", "re d</w>", "c i", "ci r"])


@pytest.fixture
def t5(tmp_path):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS), ("▁", -2.0)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(2)  # settings saved in the file must not leak in
    tokenizer.enable_padding(length=3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_clip_ids_by_hand(clip):
    folder, vocab = clip
    tokenizer = load_clip_tokenizer(folder, 10)
    ids = tokenizer(["Red\n  CIRcle", ""])
    assert ids.dtype == np.int32
    pieces = [START, "red</w>", "cir", "c", "l", "e</w>", END, END, END, END]
    assert ids.tolist() == [[vocab[piece] for piece in pieces], [vocab[START], *[vocab[END]] * 9]]
    assert tokenizer.vocab_size == len(vocab)
    assert tokenizer.pad_id == vocab[END]


def test_t5_ids_by_hand(t5):
    tokenizer = load_t5_tokenizer(t5, 6)
    assert tokenizer(["a red circle", "", "a a a a a a a"]).tolist() == [
        [3, 4, 5, 1, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [3, 3, 3, 3, 3, 1],
    ]


def test_long_prompts_end_in_the_end_token_and_report_what_was_lost(clip):
    folder, vocab = clip
    tokenizer = load_clip_tokenizer(folder, 5)
    prompt = "a  red red a\tred"
    assert tokenizer([prompt])[0].tolist() == [vocab[p] for p in (START, "a</w>", "red</w>", "red</w>", END)]
    assert tokenizer.truncated(prompt) == "a\tred"
    assert tokenizer.truncated("a red red") is None
    assert tokenizer.truncated("a red " * 9) == ("a red " * 9)[8:].strip()


def test_t5_reports_what_was_lost(t5):
    tokenizer = load_t5_tokenizer(t5, 3)
    assert tokenizer.truncated("a red circle a red") == "circle a red"
    assert tokenizer.truncated("a red") is None


def test_unknown_words(clip):
    folder, _ = clip
    tokenizer = load_clip_tokenizer(folder)
    assert tokenizer.unknown_words("a red Circle") == []
    assert tokenizer.unknown_words("a MAUVE red purple, circle purple, ") == ["MAUVE", "purple,"]
    assert tokenizer.unknown_words(f"red {END} a") == []


def test_unknown_words_of_t5(t5):
    tokenizer = load_t5_tokenizer(t5, 16)
    assert tokenizer.unknown_words("a mauve red xcircle") == ["mauve", "xcircle"]
    assert tokenizer.unknown_words("a red") == []


def test_padding_token_of_the_folder_is_used(clip):
    folder, vocab = clip
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "a"}}))
    assert load_clip_tokenizer(folder, 4)(["red"])[0].tolist()[-1] == vocab["a"]


def test_arguments(clip):
    folder, _ = clip
    with pytest.raises(ValueError, match="length 2"):
        load_clip_tokenizer(folder, 2)
    with pytest.raises(TypeError, match="list of strings"):
        load_clip_tokenizer(folder)("a red circle")
    with pytest.raises(TypeError):
        load_clip_tokenizer(folder)(["a", 3])


def test_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_clip_tokenizer(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"vocab\.json with merges\.txt"):
        load_clip_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="copy it from"):
        load_t5_tokenizer(tmp_path, 8)
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only spiece\.model; convert it once"):
        load_t5_tokenizer(tmp_path, 8)


def test_damaged_files(clip):
    folder, _ = clip
    (folder / "merges.txt").write_text("#version: 0.2\nz z\n")
    with pytest.raises(CheckpointError, match=r"merges\.txt do not make a vocabulary"):
        load_clip_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokeniser file"):
        load_clip_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_clip_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"pad_token": 3}')
    with pytest.raises(CheckpointError, match="special token 3"):
        load_clip_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": ["a"]}')
    with pytest.raises(CheckpointError, match="added_tokens_decoder"):
        load_clip_tokenizer(folder)


def test_tokeniser_of_another_kind_is_refused(t5):
    with pytest.raises(CheckpointError, match="another kind of text encoder"):
        load_clip_tokenizer(t5)
    bert = Tokenizer(WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}, unk_token="[UNK]"))
    bert.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    bert.save(str(t5 / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"empty prompt into \[1, 2\]"):
        load_t5_tokenizer(t5, 8)
