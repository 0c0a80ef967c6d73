"""A plain decoder-only transformer, to validate and compile; the lab does not train it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Transformer"]


class Transformer(nn.Module):
    """Token and position embeddings, blocks that normalise first, a last norm and a head.

    input: int64 [samples, tokens], at most `max_length` tokens; output: logits [samples, tokens, vocab_size].
    tied: the head's weight is the token embedding's.
    Raises ValueError for a `hidden_size` that `num_heads` does not divide, and for longer inputs.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        filter_size: int,
        max_length: int = 2048,
        *,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = _table(vocab_size, hidden_size)
        self.positions = _table(max_length, hidden_size)
        self.blocks = nn.ModuleList(_Block(hidden_size, num_heads, filter_size) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits."""
        length, most = tokens.shape[-1], self.positions.num_embeddings
        if length > most:
            raise ValueError(f"tokens are at most max_length={most} long; got {length}: cut them or raise max_length")
        x = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _table(rows: int, width: int) -> nn.Embedding:
    """An embedding of normal numbers; on the meta device torch would load its compiler to draw none."""
    weight = torch.empty(rows, width)
    table: nn.Embedding = nn.Embedding.from_pretrained(
        weight if weight.is_meta else nn.init.normal_(weight), freeze=False
    )
    return table


class _Block(nn.Module):
    """Attention and two linear layers, each after a norm and added to what it read: [samples, tokens, hidden_size]."""

    def __init__(self, hidden_size: int, num_heads: int, filter_size: int) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads divides hidden_size; got {num_heads} and {hidden_size}: change one of them")
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.fc1 = nn.Linear(hidden_size, filter_size)
        self.fc2 = nn.Linear(filter_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        split = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = split.movedim(-3, 0).transpose(-3, -2).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(-3, -2).flatten(-2))
        added: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return added
