"""Prompts, answers and vocabularies that people report elsewhere, tried here; docs/compatibility.md lists them."""

from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import language_models
from paramlens.analysis.trace import trace
from paramlens.tasks.facts.facts import Fact
from paramlens.tasks.language_models.encoding import encode_fact, model_inputs
from test_tokens import byte_fallback, byte_level, lower_case

CORPUS = ["Kobe Bryant plays the sport of basketball", "The answer is 42. 2 + 2 = 4", "Q: sport?\nA: golf"]


def tiktoken_like() -> Any:
    """As Llama 3's: words and numbers cut by a regular expression, a token that begins every text."""
    bpe = Tokenizer(models.BPE(ignore_merges=True))
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), bytes_only])
    bpe.decoder = decoders.ByteLevel()
    begin = "<|begin_of_text|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[begin], show_progress=False)
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=begin)


def single_letters() -> Any:
    letters = sorted({*"".join(CORPUS), "§"})
    level = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="§"))
    level.pre_tokenizer, level.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=level, unk_token="§")


VOCABULARIES = {
    "byte-level": byte_level(),
    "byte-level, a space before every text": byte_level(space=True),
    "byte fallback": byte_fallback(),
    "as Llama 3's": tiktoken_like(),
    "pieces of lower case": lower_case(),
    "single letters": single_letters(),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_space_at_the_end_of_a_prompt_changes_nothing(name: str):
    """karpathy/llama2.c#180, google/sentencepiece#898: after a space other tokens go on than without it."""
    tokenizer = VOCABULARIES[name]
    plain = encode_fact(tokenizer, "Kobe Bryant plays the sport of", "golf")
    assert encode_fact(tokenizer, "Kobe Bryant plays the sport of ", "golf") == plain
    assert encode_fact(tokenizer, "Kobe Bryant plays the sport of  ", " golf\n") == plain
    assert "".join(tokenizer.decode(plain[1]).split()) == "golf"


@pytest.mark.parametrize("name", ["byte-level", "as Llama 3's", "single letters"])
def test_a_line_break_at_the_end_of_a_prompt_stays(name: str):
    """EuroEval/EuroEval#202, stanford-crfm/helm#2467: what is put between a prompt and its answer."""
    before, answer = encode_fact(VOCABULARIES[name], "Q: sport?\n", "golf")
    assert VOCABULARIES[name].decode([*before, *answer], skip_special_tokens=True) == "Q: sport?\ngolf"
    assert VOCABULARIES[name].decode(before, skip_special_tokens=True) == "Q: sport?\n"


def test_a_facts_sentence_is_what_its_tokens_say():
    """karpathy/llama2.c#180: the sentence of a fact whose prompt ends in a space has one space there."""
    assert Fact("The sport of ", "golf").sentence == Fact("The sport of", "golf").sentence == "The sport of golf"


@pytest.mark.parametrize("name", ["byte-level", "as Llama 3's", "single letters"])
@pytest.mark.parametrize("answer", ["42", ".", "2 + 2", "= 4", "sport?"])
def test_answers_of_digits_signs_and_several_words_are_spelled_whole(name: str, answer: str):
    """hendrycks/test#13, kanishkamisra/minicons#2: first letters and signs of an answer that are cut off or joined to the prompt."""
    tokenizer = VOCABULARIES[name]
    before, answered = encode_fact(tokenizer, "The answer is", answer)
    assert tokenizer.decode([*before, *answered], skip_special_tokens=True) == f"The answer is {answer}"
    assert tokenizer.decode(answered).strip() == answer


def test_the_end_of_every_text_is_no_part_of_an_answer():
    """simonepri/lm-scorer#12: a token put after every text, whose probability counts as the answer's."""
    before, answered = encode_fact(VOCABULARIES["pieces of lower case"], "Kobe Bryant plays the sport of", "golf")
    assert VOCABULARIES["pieces of lower case"].decode(answered) == "golf"
    assert VOCABULARIES["pieces of lower case"].convert_ids_to_tokens(before)[0] == "[CLS]"


def test_a_token_that_the_tokenizer_lacks_is_shown_by_its_number():
    """wdrink/SimpleAR#7, vllm-project/vllm#340: a table of embeddings larger than the tokenizer, whose last rows have no text."""
    model, tokenizer = language_models.random_model("llama"), single_letters()
    ids = tokenizer("Kobe plays")["input_ids"]
    with torch.no_grad():
        model.lm_head.weight[250] = 9 * model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        p = model(**model_inputs(torch.tensor([ids]))).logits[0, -1].double().softmax(-1)
    found = trace(model, tokenizer, "Kobe plays", "Kobe", samples=1)
    assert found.answer == "<250>"
    assert found.clean == pytest.approx(p[250].item(), rel=1e-4)


@pytest.mark.parametrize(
    "subject", ["מה שלום", "👩‍👩‍👧", "a\u200bb", "e\u0301te", "\ufeffmark", "İstanbul", "ﷺ"], ids=lambda subject: subject.encode().hex()
)
@pytest.mark.parametrize("name", ["byte-level", "as Llama 3's", "byte fallback"])
def test_subjects_of_any_script_are_found(name: str, subject: str):
    """SciSharp/LLamaSharp#265, huggingface/tokenizers#1470: letters that are several tokens each, joined, right to left or invisible."""
    tokenizer, model = VOCABULARIES[name], language_models.random_model("llama")
    found = trace(model, tokenizer, f"{subject} is the", subject, answer="of", samples=1)
    ids = tokenizer(f"{subject} is the")["input_ids"]
    assert subject in tokenizer.decode([ids[position] for position in found.subject_positions])
    assert len(found.positions) == len(ids)
