"""nanoGPT's network: a pre-norm decoder without biases, whose embedding is its output layer too."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpt.settings import Size


class Block(nn.Module):
    """Causal self-attention, then a perceptron, each added to what came in."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.ln_1 = nn.LayerNorm(size.width, bias=False)
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.attn_out = nn.Linear(size.width, size.width, bias=False)
        self.ln_2 = nn.LayerNorm(size.width, bias=False)
        self.mlp_in = nn.Linear(size.width, 4 * size.width, bias=False)
        self.mlp_out = nn.Linear(4 * size.width, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time, width]`` to the same."""
        q, k, v = self.qkv(self.ln_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn_out(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp_out(functional.gelu(self.mlp_in(self.ln_2(x))))


class GPT(nn.Module):
    """Bytes in, logits of each next byte out."""

    def __init__(self, size: Size, seed: int) -> None:
        super().__init__()
        self.token = nn.Embedding(256, size.width)
        self.position = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.ln_f = nn.LayerNorm(size.width, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                into_residual = name.endswith(("attn_out.weight", "mlp_out.weight"))
                nn.init.normal_(p, std=0.02 / (2 * size.layers) ** 0.5 if into_residual else 0.02, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time]`` bytes to ``[batch, time, 256]`` logits."""
        x = self.token(x) + self.position.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.ln_f(x), self.token.weight)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over all bytes, in nats."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
