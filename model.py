"""GPT-2 (Radford et al., 2019) in PyTorch: forward, loss, parameter groups, cached generation.

Imports only torch and `config`: this file is published beside the checkpoint.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import GPTConfig, InputError


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout(x, p), at a fraction of its price on CPUs.

    There sixteen random bits decide over each entry, as drawing those is several times as fast as
    torch's Bernoulli numbers; p is rounded down to a multiple of 2⁻¹⁶.
    """
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    return torch.where(bits >= int(p * 2**16) - 2**15, x / (1 - p), 0)


def masked_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """softmax(q kᵀ / √d) v written out, for a torch without scaled_dot_product_attention.

    q is (..., T, d); k and v are (..., S, d). attn_mask (T, S) is true where a query may look;
    is_causal lets query t see keys 0 to t.
    """
    scores = q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = torch.where(attn_mask, scores, -math.inf)
    return dropout(scores.softmax(-1), dropout_p) @ v


attention = getattr(F, "scaled_dot_product_attention", masked_softmax_attention)


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of softmax(x weightᵀ), a chunk of rows at a time.

    The logits of a batch are its largest tensor by far, so they never exist as a whole: each
    chunk's gradients are taken while its logits are there. Gradients are of the sum, scaled only
    in backward: dividing by the number of tokens first would underflow in float16.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, keep_gradients: bool) -> Tensor:
        """x (N, C), weight (V, C), targets (N,) to a () float32 loss; products in x's dtype."""
        num_classes, on_gpu = len(weight), x.is_cuda
        weight = weight.to(x.dtype)
        if on_gpu:  # tensor cores want rows that start at aligned addresses
            weight = F.pad(weight, (0, 0, 0, -num_classes % 64))
        # Few chunks, as each adds to all of weight_grad; but float32 fills a CPU's caches early.
        rows = max(
            256, (2**21 if x.dtype == torch.float32 and not on_gpu else 2**26) // num_classes
        )
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        if keep_gradients:
            x_grad = torch.empty_like(x)
            weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        for first in range(0, len(x), rows):
            chunk, chunk_targets = x[first : first + rows], targets[first : first + rows]
            at_targets = torch.arange(len(chunk), device=x.device), chunk_targets
            logits = chunk @ weight.T
            if on_gpu:
                logits[:, num_classes:] = -math.inf
            target_logits, largest = logits[at_targets].float(), logits.amax(-1).float()
            probabilities = torch.softmax(logits, -1, out=logits)
            # the log of the softmax's denominator, from its largest entry, which is never tiny
            log_total = largest - probabilities.amax(-1).float().log()
            log_probability = target_logits - log_total
            loss -= log_probability.sum()
            if keep_gradients:  # softmax minus one-hot, with all digits of a target nearly certain
                error = probabilities
                error[at_targets] = log_probability.expm1().to(error.dtype)
                x_grad[first : first + rows] = error @ weight
                weight_grad += error.T @ chunk
        if keep_gradients:
            ctx.save_for_backward(x_grad, weight_grad[:num_classes])
        return loss

    @staticmethod
    def backward(ctx, loss_grad: Tensor):
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * loss_grad, weight_grad * loss_grad, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """F.cross_entropy(x @ weight.T, targets) without the logits in memory.

    x is (N, C), weight (V, C), targets (N,) int64; the result is the mean, a () float32 tensor.
    Under autocast the products run in its dtype; softmax and sums are always float32.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with torch.autocast(x.device.type, enabled=False):  # it would have the softmax in float32
        return LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled()) / len(x)


class Linear(nn.Linear):
    """nn.Linear, and on CPUs faster ways to the same product for the few rows of decoding.

    There a CPU spends longer on arranging the weights for its vector units than on multiplying,
    so `pack` has oneDNN arrange a copy of them once for all tokens of a story. For up to four
    float32 rows W xᵀ is faster still, given at least two columns.
    """

    packed: Tensor | None = None

    def pack(self, rows: int | None) -> None:
        """Packs for inputs of `rows` rows, where oneDNN can and it pays; None drops the copy."""
        onednn, weight, self.packed = torch.ops.mkldnn, self.weight.detach(), None
        if rows is None or not weight.is_cpu or not torch.backends.mkldnn.is_available():
            return
        if not hasattr(onednn, "_linear_pointwise"):  # torch does not promise the name
            return
        half = weight.dtype == torch.bfloat16 and onednn._is_mkldnn_bf16_supported()
        if half or (weight.dtype == torch.float32 and rows > 4):
            self.packed = onednn._reorder_linear_weight(weight, rows)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not x.is_cpu or x.dtype != self.weight.dtype:
            return super().forward(x)
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        rows = x.numel() // self.in_features
        if rows > 4 or x.dtype != torch.float32:
            return super().forward(x)
        size, x = x.shape[:-1], x.reshape(rows, -1)
        x = torch.cat((x, x)) if rows == 1 else x
        y = (self.weight @ x.T).T[:rows].contiguous().view(*size, self.out_features)
        return y if self.bias is None else y + self.bias


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: Tensor | None = None, position: int | Tensor = 0) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, d)
        seen = None
        if isinstance(position, Tensor):  # every shape is the same for every token
            cache.index_copy_(3, position, qkv[1:].to(cache.dtype))
            k, v = cache
            seen = torch.arange(k.size(2), device=x.device)[None] <= position  # (1, context_length)
        elif cache is not None:  # (2, B, n_head, context_length, d)
            cache[:, :, :, position : position + T] = qkv[1:]
            k, v = cache[:, :, :, : position + T]
        # A single query is the newest token, which sees all keys there are.
        p = self.dropout * self.training
        # With dropout torch writes attention out on CPUs too, and draws its masks slowly.
        attend = masked_softmax_attention if p and x.device.type == "cpu" else attention
        y = attend(q.to(k.dtype), k, v, seen, p, is_causal=T > 1)
        y = y.to(qkv.dtype).transpose(1, 2).reshape(B, T, C)
        return dropout(self.c_proj(y), p)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        # GPT-2's tanh form, so that exported weights mean the same elsewhere
        y = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return dropout(y, self.dropout * self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: Tensor | None = None, position: int | Tensor = 0) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, position)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only transformer with learned positions and tied input and output embeddings."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context_length, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.init_std
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, CausalSelfAttention | MLP):
            # Each block adds to the residual stream twice: keeps its variance at any depth.
            nn.init.normal_(module.c_proj.weight, std=std / math.sqrt(2 * self.config.n_layer))

    def num_parameters(self) -> int:
        """Parameters, the shared embedding counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """FLOPs of training on one token, forward and backward.

        6 for every weight that multiplies, and 12 · n_layer · n_embd · context_length for
        attention (Chowdhery et al., 2022, arXiv:2204.02311, appendix B).
        """
        c = self.config
        weights = self.num_parameters() - self.wpe.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.context_length

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Optimizer groups: the blocks' matrices, the embeddings, and the biases and norms.

        The first two decay, the last does not.
        """
        matrices = [p for p in self.h.parameters() if p.dim() == 2]
        vectors = [p for p in self.parameters() if p.dim() == 1]
        return [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": [self.wte.weight, self.wpe.weight], "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]

    def hidden(
        self, idx: Tensor, cache: Tensor | None = None, position: int | Tensor = 0
    ) -> Tensor:
        """(B, T) ids to (B, T, n_embd) final states, for tokens at `position` and after.

        `cache`, where given, is read and extended (see `new_cache`); T is then 1, or position 0.
        A `position` that is a (1,) int64 tensor (T is 1) makes every shape the same for every
        token, as a CUDA graph needs it, for the price of attending to the whole cache.
        """
        if isinstance(position, Tensor):
            x = self.wte(idx) + self.wpe(position)
        else:
            end = position + idx.size(1)
            if end > self.config.context_length:
                raise InputError(
                    f"{end} tokens do not fit context_length {self.config.context_length}"
                )
            x = self.wte(idx) + self.wpe.weight[position:end]
        x = dropout(x, self.config.dropout * self.training)
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i], position)
        return self.ln_f(x)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(B, T) int64 ids to (logits, loss).

        Without `targets`: logits (B, T, vocab_size) and None. With (B, T) int64 `targets`: None
        and the mean cross-entropy in nats a token. Raises InputError for T over context_length.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x), None
        return None, linear_cross_entropy(x.flatten(0, 1), self.wte.weight, targets.flatten())

    def next_token(self, idx: Tensor, cache: Tensor, position: int | Tensor) -> Tensor:
        """(B, T) ids at `position` and after to the (B, vocab_size) logits of the token to come."""
        return self.lm_head(self.hidden(idx, cache, position)[:, -1])

    def new_cache(self, batch_size: int) -> Tensor:
        """An empty cache of keys and values: (n_layer, 2, B, n_head, context_length, d).

        At least float32 on CPUs, whose attention for one query is several times slower in bfloat16.
        """
        c, weight = self.config, self.wte.weight
        shape = (c.n_layer, 2, batch_size, c.n_head, c.context_length, c.n_embd // c.n_head)
        dtype = weight.dtype
        if weight.is_cpu:
            dtype = torch.promote_types(dtype, torch.float32)
        return torch.zeros(shape, dtype=dtype, device=weight.device)

    def pack(self, rows: int | None) -> None:
        """Packs the weights of all products, see `Linear.pack`."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack(rows)

    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        end_of_text: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yields the continuation of (B, T) int64 `idx`, one (B, 1) column of ids at a time.

        temperature 0 is greedy; top_k keeps the k likeliest tokens; top_p keeps the smallest set
        of likeliest tokens that reaches that probability (Holtzman et al., 2019). With
        `end_of_text` given, a row that has told it repeats it, and all rows having told it ends
        the stream. Only the last context_length tokens of `idx` are read. When the context is
        full, its last half is read again and the window goes on from there, so that a long story
        costs one extra forward pass every context_length / 2 tokens.

        Raises InputError for sampling arguments out of range or an empty `idx`.
        """
        check_sampling(idx, max_new_tokens, temperature, top_k, top_p)
        return self._stream(idx, max_new_tokens, temperature, top_k, top_p, end_of_text, generator)

    @torch.no_grad()
    def _stream(
        self, idx, max_new_tokens, temperature, top_k, top_p, end_of_text, generator
    ) -> Iterator[Tensor]:
        was_training = self.training
        self.eval()
        try:
            B, end = idx.shape
            context_length = self.config.context_length
            tokens = torch.cat((idx, idx.new_empty(B, max_new_tokens)), dim=1)
            first = cached = max(0, end - context_length)  # the window and the cache begin here
            cache = self.new_cache(B)
            decode = None
            rows = 1 if (idx == idx[:1]).all() else B  # of the same prompt: read once for all
            finished = torch.zeros_like(idx[:, :1], dtype=torch.bool)
            for _ in range(max_new_tokens):
                if end - first > context_length:
                    first = cached = end - max(1, context_length // 2)
                if cached > first:  # all but the newest token is in the cache
                    newest = tokens[:, cached:end], cache, cached - first
                    if decode is None and cache.is_cuda:
                        decode = GraphedDecoding(self, *newest)
                    elif decode is None:
                        decode = self.next_token
                        if max_new_tokens >= 32:  # fewer do not earn what packing costs
                            self.pack(B)
                    logits = decode(*newest)
                else:
                    read = tokens[:rows, first:end]
                    logits = self.next_token(read, cache[:, :, :rows], 0).expand(B, -1)
                    cache[:, :, rows:, :, : end - first] = cache[:, :, :1, :, : end - first]
                    rows = B
                cached = end
                token = sample(logits, temperature, top_k, top_p, generator)
                if end_of_text is not None:
                    token = token.masked_fill(finished, end_of_text)
                    finished = finished | (token == end_of_text)
                tokens[:, end : end + 1] = token
                end += 1
                yield token
                if end_of_text is not None and finished.all():
                    return
        finally:
            self.pack(None)
            self.train(was_training)

    def generate(self, idx: Tensor, max_new_tokens: int, *args, **kwargs) -> Tensor:
        """(B, T) int64 `idx` and its continuation, (B, at most T + max_new_tokens) int64.

        Takes the arguments of `stream`.
        """
        return torch.cat([idx, *self.stream(idx, max_new_tokens, *args, **kwargs)], dim=1)


class GraphedDecoding:
    """`GPT.next_token` for one token a row, recorded once as a CUDA graph and replayed.

    A replay is one launch; without it the GPU would wait for Python between a hundred small
    kernels.
    """

    def __init__(self, model: GPT, token: Tensor, cache: Tensor, position: int):
        self.token = token.clone()
        self.position = torch.full((1,), position, device=cache.device)
        stream = torch.cuda.Stream()  # what a first call sets up must not be recorded
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model.next_token(self.token, cache, self.position)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = model.next_token(self.token, cache, self.position)

    def __call__(self, token: Tensor, cache: Tensor, position: int) -> Tensor:
        self.token.copy_(token)
        self.position.fill_(position)
        self.graph.replay()
        return self.logits


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
    generator: torch.Generator | None = None,
) -> Tensor:
    """(B, vocab_size) logits to (B, 1) int64 ids, drawn on the logits' device."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    likeliest = None
    if top_k is not None and top_k < logits.size(-1):  # noise for k tokens costs less than for all
        logits, likeliest = logits.topk(top_k)
    logits = logits.float() / temperature
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # of all likelier tokens
        logits = logits.scatter(1, order, ordered.masked_fill(before >= top_p, -math.inf))
    # Dividing by exponential noise and taking the largest draws from the softmax (the Gumbel-max
    # trick) without the synchronization of torch.multinomial.
    noise = torch.empty_like(logits).exponential_(generator=generator)
    choice = (logits.softmax(-1) / noise).argmax(-1, keepdim=True)
    return choice if likeliest is None else likeliest.gather(1, choice)
