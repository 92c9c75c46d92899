"""Token ids against transformers' tokenisers and sentencepiece, on vocabularies trained here."""

import json
import random

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer

from sega_jax.models.tokenize import load_clip_tokenizer, load_t5_tokenizer

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

CORPUS = [
    "a red circle above a blue square on a striped background, it's the fox's den",
    "A photograph of 3 mountains at 06:30, f/2.8, 35mm; they're far away, we'll see",
    "portrait of an old woman, oil on canvas, highly detailed, 8k, trending",
    "un café à la crème, l'été; ein größerer Bär; naïve coöperation",
    "the quick brown fox jumps over the lazy dog 0123456789 !?.,;:'\"()[]{}<>|-_=+*/&%$#@~^`",
    "山の上の赤い鳥居 日本語 и немного русского текста ελληνικά",
] * 20

HARD = [
    "",
    " ",
    "\n\t  \r\n",
    "  leading and trailing   ",
    "tabs\tand\nnew lines\r\nand\u00a0non-breaking\u2003em\u3000ideographic spaces",
    "zero\u200bwidth\u200djoiner\ufeffmark",
    "I'M SHOUTING, IT'S LOUD, WE'LL GO, they'd they've i'm",
    "e\u0301 combining versus \u00e9 composed; \ufb01 ligature; \u2460 \u00bd \uff21\uff22 full width",
    "İstanbul ẞtraße ΑΣ ΣΑΣ ǅ",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇩🇪 👍🏽 ok 🤖",
    "日本語のプロンプト、赤い円。",
    "العربية عبرית हिन्दी ไทย 한국어",
    "1234567 12.5 3,000 ½ ٣ Ⅷ",
    "a--b__c//d\\e ...... !!!??? <<<>>> ''' \"\"\"",
    "<|startoftext|> a <|endoftext|> b<|endoftext|>c",
    "<|STARTOFTEXT|> <| endoftext |>",
    "</s> <pad> <unk> <extra_id_0>x<extra_id_1> </s>y ▁ ▁▁a",
    "control \x00 \x01 \x1f \x7f \x85 characters",
    "word " * 200,
    "x" * 500,
    "supercalifragilisticexpialidocious" * 8,
]


def prompts() -> list[str]:
    rng = random.Random(0)
    words = " ".join(CORPUS[:6]).split()
    symbols = [*"éßøñ漢字かな😀🎉\u0301\u200d\u00a0\t\n '\"<>|-1½ΣИ", *words, "  ", "it's", "I'LL"]
    drawn = ["".join(rng.choice(symbols) + rng.choice(["", " ", "  "]) for _ in range(n % 60)) for n in range(180)]
    return HARD + drawn


@pytest.fixture(scope="module")
def clip_vocabulary(tmp_path_factory):
    """A CLIP-style vocabulary in the order of the published one: bytes, bytes ending a word, merges, specials."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>", continuing_subword_prefix="", fuse_unk=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = BpeTrainer(vocab_size=700, end_of_word_suffix="</w>", initial_alphabet=[], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *("".join(pair) for pair in merges)]
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder, len(vocab)


def clip_settings(kind: str, size: int) -> dict[str, dict]:
    """Files as they were saved over the years: none, strings, objects, a list of added tokens, another padding."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    start = {"content": "<|startoftext|>", "normalized": True, **flags}
    end = {"content": "<|endoftext|>", "normalized": False, **flags}
    if kind == "bare":
        return {}
    if kind == "map":
        tokens = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "<|endoftext|>"}
        return {"special_tokens_map.json": tokens, "tokenizer_config.json": {"model_max_length": 77}}
    config = {
        "added_tokens_decoder": {str(size - 2): {**start, "special": True}, str(size - 1): {**end, "special": True}},
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    if kind == "exclamation":  # Stable Diffusion 2 pads with the token of id 0
        config["pad_token"] = "!"
        config["added_tokens_decoder"]["0"] = {"content": "!", "normalized": False, "special": True, **flags}
    return {"tokenizer_config.json": config}


def expected(tokenizer, texts, length):
    out = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    return out["input_ids"]


@pytest.mark.parametrize("kind", ["bare", "map", "decoder", "exclamation"])
@pytest.mark.parametrize("length", [77, 12])
def test_clip_ids(clip_vocabulary, tmp_path, kind, length):
    folder, size = clip_vocabulary
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for name, content in clip_settings(kind, size).items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    ours = load_clip_tokenizer(tmp_path, length)
    texts = prompts()
    np.testing.assert_array_equal(ours(texts), expected(theirs, texts, length))
    assert ours.vocab_size == size

    theirs.save_pretrained(tmp_path / "saved")  # as tokenizer.json
    assert not (tmp_path / "saved" / "merges.txt").exists()
    np.testing.assert_array_equal(load_clip_tokenizer(tmp_path / "saved", length)(texts), ours(texts))


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """A Unigram model with T5's normalisation (NFKC with its precompiled table) and special ids."""
    path = tmp_path_factory.mktemp("t5") / "spiece"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(path),
        vocab_size=400,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=0.98,
        minloglevel=2,
    )
    return path.with_suffix(".model")


@pytest.fixture(scope="module")
def t5_folder(sentencepiece_model, tmp_path_factory):
    """The same vocabulary as transformers 5 saves it."""
    source = tmp_path_factory.mktemp("source")
    (source / "spiece.model").write_bytes(sentencepiece_model.read_bytes())
    folder = tmp_path_factory.mktemp("saved")
    transformers.T5Tokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("length", [128, 12])
def test_t5_ids(t5_folder, length):
    theirs = transformers.T5Tokenizer.from_pretrained(t5_folder)
    texts = prompts()
    ours = load_t5_tokenizer(t5_folder, length)
    np.testing.assert_array_equal(ours(texts), expected(theirs, texts, length))
    assert ours.pad_id == 0
    assert len(set(ours(texts).ravel().tolist())) > 100


def test_t5_ids_of_a_file_converted_by_transformers_4(t5_folder, tmp_path):
    """FLUX.1's own file: white space is handled by the normaliser instead of the pre-tokeniser."""
    saved = json.loads((t5_folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["normalizer"]["type"] == "Precompiled"
    tokenizer = Tokenizer(Unigram([tuple(piece) for piece in saved["model"]["vocab"]], unk_id=2))
    tokenizer.normalizer = normalizers.Sequence(
        [
            Tokenizer.from_file(str(t5_folder / "tokenizer.json")).normalizer,
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), "▁"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    extra = [AddedToken(f"<extra_id_{i}>", normalized=False, special=True) for i in range(99, -1, -1)]
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("<pad>", "</s>", "<unk>")] + extra)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    texts = prompts()
    ours = load_t5_tokenizer(tmp_path, 64)(texts)
    np.testing.assert_array_equal(ours, expected(theirs, texts, 64))
    # transformers 5 rebuilds the white-space handling; the two agree on all but control characters.
    rebuilt = transformers.T5Tokenizer.from_pretrained(tmp_path)
    printable = [text for text in texts if "\x00" not in text]
    np.testing.assert_array_equal(load_t5_tokenizer(tmp_path, 64)(printable), expected(rebuilt, printable, 64))


def test_t5_ids_are_sentencepiece_ids(sentencepiece_model, t5_folder):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    ours = load_t5_tokenizer(t5_folder, 400)
    for text in prompts():
        # Special tokens written out are not text to transformers, and control characters are kept there.
        if "<" in text or "▁" in text or "\x00" in text:
            continue
        ids = [*processor.encode(text), processor.eos_id()][:400]
        row = ours([text])[0]
        if len(ids) < 400:
            assert row[: len(ids)].tolist() == ids, text
            assert not row[len(ids) :].any()
