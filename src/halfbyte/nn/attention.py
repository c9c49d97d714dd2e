"""MultiheadAttention under plans: ``q``, ``k``, ``v`` and ``out``, and on request the two products of each head.

The four projections are linear layers. The products ``qk_0``, ``qk_1``, ... (queries with keys) and ``pv_0``, ``pv_1``,
... (probabilities with values) have no weight and are sensitive to range, so they compute in floating point unless a
rule names them. The softmax, masks and dropout are torch's.

Dimensions: B batch, L queries, S keys, H heads, D elements of a head, E = H D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .planned import PlannedMany, Unit, refuse_nested

__all__ = ["MultiheadAttention"]


class MultiheadAttention(PlannedMany, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` under plans. It has no fused path for evaluation."""

    @staticmethod
    def units(module: nn.Module) -> tuple[Unit, ...]:
        """The four projections, then the products of each head, which a rule must name."""
        assert isinstance(module, nn.MultiheadAttention)
        products = [f"{product}_{head}" for product in ("qk", "pv") for head in range(module.num_heads)]
        return (*(Unit(name=n) for n in ("q", "k", "v", "out")), *(Unit(name=n, opt_in=True) for n in products))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention as torch's module defines it.

        Args:
            query: (L, B, E), (B, L, E) if ``batch_first``, or (L, E).
            key: (S, B, kdim), and so on.
            value: (S, B, vdim), and so on.
            key_padding_mask: (B, S) or (S,); True hides a key, a number is added to its scores.
            need_weights: whether the probabilities are returned.
            attn_mask: (L, S) or (B H, L, S); True hides, a number is added.
            average_attn_weights: whether the returned probabilities are the mean over heads.
            is_causal: a hint that `attn_mask` is the causal mask.

        Returns:
            The output in the query's layout, and the probabilities ([B,] [H,] L, S) or None.

        Raises:
            ValueError: if key and value do not fit together, or is_causal comes without a mask.
        """
        refuse_nested("MultiheadAttention", (query, key, value))
        masks = (key_padding_mask, attn_mask)
        batched = F._mha_shape_check(query, key, value, *masks, self.num_heads)  # type: ignore[attr-defined]
        if is_causal and attn_mask is None:
            raise ValueError(
                "MultiheadAttention: is_causal=True was given without attn_mask; it is a hint about that mask. "
                "torch.nn.Transformer.generate_square_subsequent_mask(length) makes one."
            )
        # As in torch, the hint takes the place of the mask where the mask is needed for nothing else.
        causal = is_causal and key_padding_mask is None and not need_weights
        given = [
            x.unsqueeze(0) if not batched else x if self.batch_first else x.transpose(0, 1) for x in (query, key, value)
        ]
        batch, length, keys = *given[0].shape[:2], given[1].shape[1]
        q_BHLD, k_BHSD, v_BHSD = self._heads(*given)
        mask = None if causal else self._mask(*masks, query.dtype, (batch, length, keys))
        if mask is not None:
            mask = F.pad(mask, (0, k_BHSD.shape[2] - keys))  # open for the keys that the module adds
        probabilities = None
        if need_weights or any(name[:3] in ("qk_", "pv_") for name in self.plans):
            y_BHLD, probabilities = self._attend(q_BHLD, k_BHSD, v_BHSD, mask, causal)
        else:
            dropout = self.dropout if self.training else 0.0
            y_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD, mask, dropout, causal)
        y_BLE = y_BHLD.transpose(1, 2).reshape(batch, length, self.embed_dim)
        y_BLE = self.product("out", y_BLE, self.out_proj.weight, self.out_proj.bias)
        y = y_BLE.squeeze(0) if not batched else y_BLE if self.batch_first else y_BLE.transpose(0, 1)
        if not need_weights or probabilities is None:
            return y, None
        weights = probabilities.mean(1) if average_attn_weights else probabilities
        return y, weights if batched else weights.squeeze(0)

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The projections of (B, length, features) tensors and the module's own keys and values: (B, H, length, D)."""
        if key.shape[:2] != value.shape[:2] or key.shape[0] != query.shape[0]:
            raise ValueError(
                f"MultiheadAttention: queries, keys and values of batch and length {tuple(query.shape[:2])}, "
                f"{tuple(key.shape[:2])} and {tuple(value.shape[:2])} were given; one batch size for all, and as many "
                "values as keys are possible."
            )
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        given = zip("qkv", (query, key, value), weights, biases, strict=True)
        q, k, v = (self.product(name, x, weight, bias) for name, x, weight, bias in given)
        if self.bias_k is not None and self.bias_v is not None:
            own = (self.bias_k.to(k.dtype), self.bias_v.to(v.dtype))
            k, v = (torch.cat((x, b.expand(x.shape[0], 1, -1)), 1) for x, b in zip((k, v), own, strict=True))
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return q, k, v

    def _mask(
        self, padding: Tensor | None, mask: Tensor | None, dtype: torch.dtype, sizes: tuple[int, int, int]
    ) -> Tensor | None:
        """What both masks add to the scores, (1 or B, 1 or H, 1 or L, S); None where there is none."""
        batch, length, keys = sizes
        kind = F._none_or_dtype(mask)
        padding = F._canonical_mask(padding, "key_padding_mask", kind, "attn_mask", dtype)
        mask = F._canonical_mask(mask, "attn_mask", None, "", dtype, check_other=False)
        if mask is not None:
            _check_shape("attn_mask", mask, (length, keys), (batch * self.num_heads, length, keys))
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, self.num_heads))
        if padding is not None:
            padding = padding if padding.dim() == 2 else padding[None]
            _check_shape("key_padding_mask", padding, (batch, keys))
            padding = padding[:, None, None]
        return padding if mask is None else mask if padding is None else mask + padding

    def _attend(
        self, q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """The output (B, H, L, D) and the probabilities (B, H, L, S), each product under its plan if it has one."""
        scores = self._products("qk", q_BHLD * self.head_dim**-0.5, k_BHSD)
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        probabilities = torch.softmax(scores if mask is None else scores + mask, -1)
        probabilities = F.dropout(probabilities, self.dropout, self.training)
        return self._products("pv", probabilities, v_BHSD.transpose(-1, -2)), probabilities

    def _products(self, name: str, a_BHMK: Tensor, b_BHNK: Tensor) -> Tensor:
        """``a @ b^T`` for each head: (B, H, M, N)."""
        plans = [self.find_plan(f"{name}_{head}") for head in range(self.num_heads)]
        if not any(plans):
            return a_BHMK @ b_BHNK.transpose(-1, -2)
        heads = [
            a @ b.transpose(-1, -2) if plan is None else ops.matmul(a, b, plan)
            for a, b, plan in zip(a_BHMK.unbind(1), b_BHNK.unbind(1), plans, strict=True)
        ]
        return torch.stack(heads, 1)


def _check_shape(name: str, mask: Tensor, *possible: tuple[int, ...]) -> None:
    if tuple(mask.shape) not in possible:
        raise ValueError(
            f"MultiheadAttention: {name} of shape {tuple(mask.shape)} was given; "
            f"{' and '.join(map(str, possible))} {'is' if len(possible) == 1 else 'are'} possible."
        )
