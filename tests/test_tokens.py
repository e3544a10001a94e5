"""Words are found in any vocabulary: byte-level, with bytes to fall back to, in pieces of lower case; with offsets and without."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from paramlens.errors import ConfigError
from paramlens.tasks.language_models.encoding import encode_fact
from paramlens.tasks.language_models.tokens import open_ended, positions_of, token_texts

CORPUS = ["Kobe Bryant plays the sport of basketball", "Tiger Woods plays the sport of golf"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(*, space: bool = False):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=space), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def byte_fallback():
    """As Llama's first tokenizers: a space before every text, a token that begins it."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), *((byte, -20.0) for byte in BYTES), *((letter, -10.0) for letter in "▁KBTW" + LETTERS)]
    unigram = Tokenizer(models.Unigram([*pieces, ("▁Kobe", -3.0), ("▁plays", -3.0)], 0, byte_fallback=True))
    unigram.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    after = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    unigram.decoder = decoders.Sequence(after)
    unigram.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=unigram, bos_token="<s>", unk_token="<unk>")


def lower_case():
    """As BERT's: pieces of lower case without accents, a token before and one after every text."""
    words = sorted({word for sentence in CORPUS for word in sentence.lower().split()})
    pieces = ["[UNK]", "[CLS]", "[SEP]", *words, *LETTERS, *(f"##{letter}" for letter in LETTERS), "東", "京"]
    wordpiece = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    wordpiece.normalizer, wordpiece.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    around = [("[CLS]", 1), ("[SEP]", 2)]
    wordpiece.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=wordpiece, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


class WithoutOffsets:
    """A tokenizer that has none, as those written in Python."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name: str):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **kwargs):
        assert "return_offsets_mapping" not in kwargs
        return self.tokenizer(*args, **kwargs)


TOKENIZERS = {
    "byte-level": byte_level(),
    "with a space": byte_level(space=True),
    "byte fallback": byte_fallback(),
    "lower case": lower_case(),
}


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Beyoncé sings the", "Beyoncé"),
        ("the 東京 is", "東京"),
        ("東京 is", "京"),
        ("x 🏀👩‍👩‍👧 plays", "👩‍👩‍👧"),
        ("e\u0301a b", "e\u0301a"),
        ("Kobe plays", "Kobe"),
        ("ab Kobe cd", "Kobe cd"),
        ("ab Kobe ab", " ab"),
    ],
)
def test_the_tokens_of_words_spell_them_and_no_others_do(name: str, text: str, words: str, *, offsets: bool):
    tokenizer = TOKENIZERS[name]
    if name == "lower case" and "🏀" in text:
        pytest.skip("one unknown token for all of it")
    found = positions_of(tokenizer if offsets else WithoutOffsets(tokenizer), text, words)
    ids = tokenizer(text)["input_ids"]
    decoded = tokenizer.decode([ids[i] for i in found]).strip()
    expected = {"lower case": {"Beyoncé": "beyonce", "東京": "東 京", "e\u0301a": "ea"}}.get(name, {})
    assert decoded == expected.get(words.strip(), words.strip().lower() if name == "lower case" else words.strip())


def test_texts_are_readable():
    for name in ("byte-level", "byte fallback"):
        tokenizer = TOKENIZERS[name]
        assert token_texts(tokenizer, tokenizer("aé\n plays")["input_ids"])[-5:] == ["a", "<0xC3>", "<0xA9>", "\n", " plays"]
    merged = byte_level()
    merged.add_tokens(["né Ġ"])
    assert token_texts(merged, [len(merged) - 1, len(merged) + 5]) == ["né Ġ", f"<{len(merged) + 5}>"]


def test_a_whole_character_in_one_token_is_shown_as_it_is():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    bpe.train_from_iterator(["Beyoncé 東京"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    assert token_texts(tokenizer, tokenizer("Beyoncé 東京")["input_ids"]) == ["Beyoncé", " 東京"]


def test_the_first_of_several_places_counts_and_what_is_missing_is_refused():
    tokenizer = TOKENIZERS["byte-level"]
    assert positions_of(tokenizer, "Kobe plays Kobe", "Kobe") == [0]
    for words in ("Tiger", "", "  "):
        with pytest.raises(ConfigError, match="not in 'Kobe plays'"):
            positions_of(tokenizer, "Kobe plays", words)


def test_a_token_put_after_every_text_is_no_part_of_an_answer():
    tokenizer = TOKENIZERS["lower case"]
    assert tokenizer.decode(open_ended(tokenizer, "Kobe plays")) == "[CLS] kobe plays"
    before, after = encode_fact(tokenizer, "Kobe plays the sport of", "golf")
    assert tokenizer.decode(after) == "golf"
    assert tokenizer.decode(before) == "[CLS] kobe plays the sport of"
