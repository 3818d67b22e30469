"""GPT-2 (Radford et al., 2019) in plain PyTorch: the model first, then how it generates.

Published beside the checkpoint, so it imports torch and `config` only. Layers have the names of
GPT-2's own checkpoints. B is the batch, T the tokens of a row, N = B · T, V = vocab_size,
C = n_embd the width, d = C / n_head the width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import GPTConfig, InputError


def attention_weights(q: Tensor, k: Tensor, is_causal: bool = False) -> Tensor:
    """Computes softmax(q kᵀ / √d): how much each query attends to each key (Vaswani et al., 2017,
    arXiv:1706.03762).

    q is (..., T, d), k is (..., S, d); returns (..., T, S). With `is_causal` query t sees keys 0
    to t.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # or softmax saturates
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores.softmax(-1)


def written_out_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Computes the equation itself: y = softmax(q kᵀ / √d) v (..., T, d), weights (..., T, S)."""
    weights = attention_weights(q, k, is_causal)
    return F.dropout(weights, dropout_p) @ v, weights


def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool) -> Tensor:
    """Computes the same y by torch's fused kernel, or as written out where torch has none."""
    if hasattr(F, "scaled_dot_product_attention"):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal)
    return written_out_attention(q, k, v, dropout_p, is_causal)[0]


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and those before it: (B, T, C) to the same.

    With a `cache` (see `KVCache`), the T tokens of `x` follow those in it, and are added to it.
    """

    # storygpt/kernels.py may replace this by a faster one, whose dropout draws differ.
    attention = staticmethod(attention)

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turns (B, T, C) into queries, keys and values of all heads, each (B, n_head, T, d)."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        return qkv.permute(2, 0, 3, 1, 4).unbind()

    def weights(self, x: Tensor) -> Tensor:
        """Turns (B, T, C) into (B, n_head, T, T): how much each token takes from each."""
        q, k, _ = self.heads(x)
        return attention_weights(q, k, is_causal=True)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        dropout = self.dropout if self.training else 0.0  # the kernel has no `training` flag
        q, k, v = self.heads(x)
        if cache is not None:  # the keys and values of all tokens so far
            k, v = cache.append(k, v)
        # Several tokens come only while the cache is empty (`hidden` sees to it), and each sees
        # those up to itself; a single one is the newest, which may look at every key there is.
        y = self.attention(q, k, v, dropout, is_causal=T > 1)
        # the heads side by side again: (B, n_head, T, d) to (B, T, C)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), dropout)


class MLP(nn.Module):
    """Two linear layers, applied to each token by itself: (B, T, C) to the same."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        # GPT-2's tanh form, so that exported weights mean the same elsewhere
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then the MLP; both read the residual stream (B, T, C) normalized and add to it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Computes the mean loss in nats a token: x (N, C), output embedding (V, C), targets (N,) int64
    to ()."""
    logits = F.linear(x, weight).float()  # bfloat16 is too coarse for a loss
    return F.cross_entropy(logits, targets)


class GPT(nn.Module):
    """A decoder-only transformer with learned positions and tied input and output embeddings."""

    # storygpt/kernels.py may replace this by one that keeps no (N, V) logits in memory.
    loss_function = staticmethod(cross_entropy)

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context_length, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.init_std
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, CausalSelfAttention | MLP):  # `apply` comes to children before it
            # 2 * n_layer of these add up in the residual stream: its variance holds at any depth.
            nn.init.normal_(module.c_proj.weight, std=std / math.sqrt(2 * self.config.n_layer))

    def num_parameters(self) -> int:
        """Counts the parameters, the shared embedding once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Counts the FLOPs of training on one token, forward and backward.

        6 for every weight that multiplies, and 12 · n_layer · n_embd · context_length for
        attention (Chowdhery et al., 2022, arXiv:2204.02311, appendix B).
        """
        c = self.config
        weights = self.num_parameters() - self.wpe.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.context_length

    def embed(self, idx: Tensor, past: int = 0) -> Tensor:
        """Turns (B, T) int64 ids into (B, T, C): the sum of each token's vector and its place's.

        The first stands at place `past`. Raises InputError where they do not fit the context.
        """
        end = past + idx.size(1)
        if end > self.config.context_length:
            raise InputError(f"{end} tokens do not fit context_length {self.config.context_length}")
        places = self.wpe.weight[past:end]
        return self.wte(idx) + places

    def attention_weights(self, idx: Tensor, layer: int) -> Tensor:
        """Turns (B, T) int64 ids into (B, n_head, T, T): how much each token takes from each in one
        layer.

        Layers count from 0. Row t is of token t, and sums to 1.
        """
        x = self.embed(idx)
        for block in self.h[:layer]:
            x = block(x)
        block = self.h[layer]
        return block.attn.weights(block.ln_1(x))

    def hidden(self, idx: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        """Turns (B, T) int64 ids into (B, T, C), what the blocks make of each token.

        With a `cache` (see `new_cache`) the tokens follow those in it, and are added to it.
        Raises InputError where they do not fit the context, or are several after cached ones:
        the causal mask would take them for the first.
        """
        past = cache[0].length if cache else 0
        if past and idx.size(1) > 1:
            raise InputError(
                f"a cache that holds tokens takes one more at a time, not {idx.size(1)}"
            )
        x = F.dropout(self.embed(idx, past), self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache else None)
        return self.ln_f(x)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Turns (B, T) int64 ids into (logits, loss).

        Without `targets`: logits (B, T, vocab_size) and None. With (B, T) int64 `targets`: None
        and the mean cross-entropy in nats a token. Raises InputError for T over context_length.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x), None
        return None, self.loss_function(x.flatten(0, 1), self.wte.weight, targets.flatten())

    # --- Generation ---

    def new_cache(self) -> list[KVCache]:
        """Returns an empty cache for one batch: one KVCache per block."""
        return [KVCache(self.config.context_length) for _ in self.h]

    @torch.no_grad()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        end_of_text: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Iterator[Tensor]:
        """Yields the continuation of (B, T) int64 `idx`, one (B, 1) column of ids at a time.

        temperature divides the logits, 0 is greedy; top_k keeps the k likeliest tokens; top_p the
        smallest set of likeliest tokens that reaches that probability (Holtzman et al., 2019).
        With `end_of_text` given, a row that has reached it repeats it, and the stream ends once
        all rows have. `generator` is one for all rows, or a sequence of one for each row.

        Only the last context_length tokens of `idx` are read. When the context is full, its last
        half is read again, at the first positions, and the story goes on from there: a long one
        costs one more forward pass every context_length / 2 tokens.

        Raises InputError for sampling arguments out of range, an empty `idx`, and logits that
        are not finite.
        """
        check_sampling(idx, max_new_tokens, temperature, top_k, top_p)
        was_training = self.training
        self.eval()
        try:
            context_length = self.config.context_length
            window, cache = idx[:, -context_length:], self.new_cache()
            unread = window  # what the cache lacks
            finished = torch.zeros_like(idx[:, :1], dtype=torch.bool)
            for _ in range(max_new_tokens):
                logits = self.lm_head(self.hidden(unread, cache)[:, -1])
                if not logits.isfinite().all():
                    raise InputError("the model's logits are not finite: its weights are broken")
                token = sample(logits, temperature, top_k, top_p, generator)
                if end_of_text is not None:
                    token = token.masked_fill(finished, end_of_text)
                    finished = token == end_of_text
                yield token
                if end_of_text is not None and finished.all():
                    return
                window, unread = torch.cat((window, token), dim=1), token
                if window.size(1) > context_length:
                    window = unread = window[:, -max(1, context_length // 2) :]
                    cache = self.new_cache()
        finally:
            self.train(was_training)

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        end_of_text: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Returns (B, T) int64 `idx` and its continuation, (B, at most T + max_new_tokens) int64.

        The arguments are those of `stream`.
        """
        new = self.stream(idx, max_new_tokens, temperature, top_k, top_p, end_of_text, generator)
        return torch.cat([idx, *new], dim=1)


class KVCache:
    """Keys and values of one block's past tokens, so that each is computed once.

    Memory for `capacity` tokens is taken at the first `append`, in its shape and dtype.
    """

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds T tokens' (B, n_head, T, d) each; returns those of all tokens so far."""
        if self.length == 0:
            B, n_head, _, d = k.shape
            self.k, self.v = (t.new_empty(B, n_head, self.capacity, d) for t in (k, v))
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


def check_sampling(
    idx: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Raises InputError with the first argument of `GPT.stream` that is out of range."""
    for valid, message in (
        (idx.dim() == 2 and idx.numel() > 0, "the prompt has no tokens"),
        (max_new_tokens >= 0, f"max_new_tokens must be at least 0, not {max_new_tokens}"),
        (0 <= temperature < math.inf, f"temperature must be at least 0, not {temperature}"),
        (top_k is None or top_k >= 1, f"top_k must be at least 1, not {top_k}"),
        (top_p is None or 0 < top_p <= 1, f"top_p must be above 0 and at most 1, not {top_p}"),
    ):
        if not valid:
            raise InputError(message)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Turns (B, vocab_size) finite logits into (B, 1) int64 ids; arguments as in `stream`."""
    if temperature < 1e-6:  # so little that dividing by it would only lose digits
        return logits.argmax(-1, keepdim=True)
    vocab_size = logits.size(-1)
    ids = torch.arange(vocab_size, device=logits.device).expand_as(logits)
    fewer_tokens = top_k is not None and top_k < vocab_size
    less_than_all = top_p is not None and top_p < 1
    if fewer_tokens or less_than_all:  # top_p needs them in order
        logits, ids = logits.topk(min(top_k or vocab_size, vocab_size))
    probabilities = (logits.float() / temperature).softmax(-1)
    if less_than_all:
        before = probabilities.cumsum(-1) - probabilities  # of all likelier tokens
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    # The argmax of p / exponential noise is a draw from p, normalized or not (the Gumbel-max
    # trick), without the synchronization of torch.multinomial.
    if isinstance(generator, Sequence):
        rows = zip(probabilities, generator, strict=True)
        noise = torch.stack([torch.empty_like(p).exponential_(generator=g) for p, g in rows])
    else:
        noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return ids.gather(1, (probabilities / noise).argmax(-1, keepdim=True))
