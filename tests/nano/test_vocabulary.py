from pathlib import Path

import numpy as np
import pytest

from sega_jax import nano
from sega_jax.models.tokenize import load_clip_tokenizer, load_t5_tokenizer
from sega_jax.nano import grammar, vocabulary
from sega_jax.nano.next import grammar as coming

SHIPPED, COMING = tuple(grammar.words()), tuple(coming.words())


@pytest.mark.parametrize("words", [SHIPPED, COMING])
def test_every_word_is_one_token_in_both_vocabularies(tmp_path, words):
    vocabulary.write_t5(tmp_path / "t5", words)
    vocabulary.write_clip(tmp_path / "clip", words)
    t5 = load_t5_tokenizer(tmp_path / "t5", vocabulary.T5_LENGTH)
    clip = load_clip_tokenizer(tmp_path / "clip", vocabulary.CLIP_LENGTH)
    for word in words:
        for text in (word, word.capitalize()):
            assert np.sum(t5([text]) != t5.pad_id) == 2, text  # the word and </s>
            assert np.sum(clip([text]) != clip.pad_id) == 2, text  # the start and the word; the end also pads
    assert t5.vocab_size == len(vocabulary.t5_pieces(words))
    assert clip.vocab_size == len(vocabulary.clip_tables(words)[0])


@pytest.mark.parametrize("grammar", [grammar, coming])
def test_captions_fit_and_foreign_words_are_noticed(tmp_path, grammar):
    vocabulary.write_t5(tmp_path, grammar.words())
    t5 = load_t5_tokenizer(tmp_path, vocabulary.T5_LENGTH)
    captions = [grammar.caption(scene, t) for scene in grammar.UNSEEN_SCENES for t in range(len(grammar.TEMPLATES))]
    assert np.isin(t5(captions)[:, -1], (t5.pad_id, 1)).all()  # padding, or the end of a caption that just fits
    assert not any(t5.unknown_words(text) for text in captions)
    assert t5.unknown_words("a shiny red zebra") == ["shiny", "zebra"]


def test_capitals_share_the_row_of_their_word():
    pieces = [piece for piece, _ in vocabulary.t5_pieces(SHIPPED)]
    capitalised, lower = vocabulary.t5_aliases(SHIPPED)
    assert [pieces[i].lower() for i in capitalised] == [pieces[i] for i in lower]
    assert len(set(pieces)) == len(pieces)


def test_the_embedded_checkpoint_has_these_vocabularies(tmp_path):
    """The ids are part of the trained weights: a change of the grammar or of the merges needs new training."""
    embedded = Path(nano.__file__).parent / "checkpoint"
    vocabulary.write_clip(tmp_path / "tokenizer", SHIPPED)
    vocabulary.write_t5(tmp_path / "tokenizer_2", SHIPPED)
    for file in ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer.json"):
        assert (embedded / file).read_text() == (tmp_path / file).read_text(), file
