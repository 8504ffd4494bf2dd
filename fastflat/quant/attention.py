# SPDX-License-Identifier: Apache-2.0
"""Attention with quantized projections: :class:`QuantMultiheadAttention`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflat import _checks
from fastflat._spec import QuantSpec
from fastflat.quant._layer import Factory, Input, QuantLayer, autocast_dtype
from fastflat.quant.layers import QuantLinear
from fastflat.quant.quantizer import Quantizer


class QuantMultiheadAttention(QuantLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with quantized weights and inputs of its four projections::

        q, k, v = Q(query) Q(W_q)^T + b_q,  Q(key) Q(W_k)^T + b_k,  Q(value) Q(W_v)^T + b_v
        y = Q(softmax(q k^T / sqrt(head_dim) + mask) v) Q(W_o)^T + b_o

    Parameters and their names are those of ``nn.MultiheadAttention``. Quantizers: ``query_quantizer``,
    ``key_quantizer``, ``value_quantizer`` of the inputs (three, though self-attention passes one tensor);
    ``in_proj_weight_quantizer`` of the three stacked weights (one scale, or ``[3 embed_dim]`` with ``axis=0``), or
    ``q_proj_weight_quantizer`` and so on where kdim or vdim make them apart; ``out_proj`` is a :class:`QuantLinear`.
    The attention itself (scores, softmax) stays in floating point. With the quantizers off the result is that of
    ``nn.MultiheadAttention`` outside its inference fast path.

    Source: Vaswani et al., NeurIPS 2017, section 3.2.
    """

    inputs = (
        Input("query_quantizer", "embed_dim", (-1,)),
        Input("key_quantizer", "kdim", (-1,)),
        Input("value_quantizer", "vdim", (-1,)),
    )

    @classmethod
    def weight_names(cls, module: nn.Module) -> tuple[str, ...]:
        if module._qkv_same_embed_dim:
            return ("in_proj_weight",)
        return ("q_proj_weight", "k_proj_weight", "v_proj_weight")

    @classmethod
    def refuse(cls, module: nn.Module, label: str) -> None:
        if module.bias_k is not None or module.bias_v is not None:
            _checks.fail(label, "add_bias_kv", "be False in quantized attention", True, "; skip the layer")
        if module.add_zero_attn:
            _checks.fail(label, "add_zero_attn", "be False in quantized attention", True, "; skip the layer")

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        weights: QuantSpec | None = None,
        activations: QuantSpec | None = None,
        *,
        quantizer: Factory = Quantizer,
        name: str = "",
    ) -> nn.Module:
        layer = super().from_float(module, weights, activations, quantizer=quantizer, name=name)
        place = f"{name}.out_proj" if name else "out_proj"
        layer.out_proj = QuantLinear.from_float(module.out_proj, weights, activations, quantizer=quantizer, name=place)
        return layer

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
        """Attention output and weights; arguments, shapes and results of ``nn.MultiheadAttention.forward``.

        Args:
            query: ``[L, N, embed_dim]`` (``[N, L, embed_dim]`` with batch_first, ``[L, embed_dim]`` without a batch).
            key, value: ``[S, N, kdim]``, ``[S, N, vdim]``, likewise.
            key_padding_mask: ``[N, S]``, true (or ``-inf``) where a key is padding.
            need_weights: return the weights; ``False`` uses ``scaled_dot_product_attention``.
            attn_mask: ``[L, S]`` or ``[N heads, L, S]``, true where attention is barred, or added to the scores.
            average_attn_weights: average the weights over the heads.
            is_causal: attn_mask is the causal mask.

        Returns:
            y in the shape of query, and the weights ``[N, L, S]`` (``[N, heads, L, S]`` without averaging) or None.

        Raises:
            ValueError: a shape does not fit, or a tensor is nested.
        """
        self._check(query, key, value, attn_mask, is_causal)
        masks = (_additive(key_padding_mask, query.dtype), _additive(attn_mask, query.dtype))
        q, k, v = self._projections(*self._inputs(query, key, value))
        if query.dim() == 2 and masks[0] is not None:
            masks = (masks[0].unsqueeze(0), masks[1])
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(*masks, q.shape[0], k.shape[0], q.shape[1])
        y, weights = self._attend(q, k, v, mask, need_weights, causal)
        y = self.out_proj(y.flatten(0, 1)).view(q.shape)
        if query.dim() == 2:
            y = y.squeeze(1)
        elif self.batch_first:
            y = y.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if query.dim() == 2 else weights
        return y, weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
        label = type(self).__name__
        sizes = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (x, size) in sizes.items():
            if x.is_nested:
                _checks.fail(label, name, "be a dense tensor", "a nested one", "; pad it and pass key_padding_mask")
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                _checks.fail(label, name, "have 3 axes, or 2 without a batch, all alike", f"shape {list(x.shape)}")
            if x.shape[-1] != size:
                _checks.fail(label, name, f"have {size} features", f"shape {list(x.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            _checks.fail(label, "value", f"have the length and batch of key, {list(key.shape[:-1])}", list(value.shape))
        if is_causal and attn_mask is None:
            hint = "; nn.Transformer.generate_square_subsequent_mask makes it"
            _checks.fail(label, "attn_mask", "be the causal mask with is_causal=True", None, hint)

    def _inputs(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """The quantized inputs, ``[length, batch, features]``; of a batch, one tensor stays one if not quantized."""
        to = autocast_dtype(query)
        given = [(query, self.query_quantizer), (key, self.key_quantizer), (value, self.value_quantizer)]
        found = [x if q is None else q(x, to if x.dtype == torch.float32 else None) for x, q in given]
        if query.dim() == 2:
            return [x.unsqueeze(1) for x in found]
        if not self.batch_first:
            return found
        q, k, v = found
        moved = [q.transpose(0, 1)]
        moved.append(moved[0] if k is q else k.transpose(0, 1))
        moved.append(moved[0] if v is q else moved[1] if v is k else v.transpose(0, 1))
        return moved

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k, v ``[length, batch, embed_dim]``; inputs that are one tensor take one multiplication."""
        names = self.weight_names(self)
        to = autocast_dtype(query)
        weights = [self.quantized(n, to if getattr(self, n).dtype == torch.float32 else None) for n in names]
        parts = [(query, 1), (key, 1), (value, 1)]
        if len(names) == 1:
            if key is value:
                parts = [(query, 3)] if query is key else [(query, 1), (key, 2)]
            weights = weights[0].split([n * self.embed_dim for _, n in parts])
        biases: tuple = (None,) * len(parts)
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.split([n * self.embed_dim for _, n in parts])
        found: list[Tensor] = []
        for (x, n), weight, bias in zip(parts, weights, biases, strict=True):
            y = F.linear(x, weight, bias)
            found += y.unflatten(-1, (n, self.embed_dim)).movedim(-2, 0).contiguous().unbind(0)
        return found

    def _mask(self, padding: Tensor | None, mask: Tensor | None, length: int, keys: int, batch: int) -> Tensor | None:
        """What is added to the scores, ``[batch heads or 1, length or 1, keys]``."""
        label = type(self).__name__
        if mask is not None:
            shapes = ([length, keys], [batch * self.num_heads, length, keys])
            if list(mask.shape) not in shapes:
                _checks.fail(label, "attn_mask", f"have shape {shapes[0]} or {shapes[1]}", list(mask.shape))
            mask = mask.unsqueeze(0) if mask.dim() == 2 else mask
        if padding is None:
            return mask
        if list(padding.shape) != [batch, keys]:
            _checks.fail(label, "key_padding_mask", f"have shape {[batch, keys]}", list(padding.shape))
        padding = padding.view(batch, 1, 1, keys).expand(-1, self.num_heads, -1, -1)
        padding = padding.reshape(batch * self.num_heads, 1, keys)
        return padding if mask is None else mask + padding

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool, causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """y ``[length, batch, embed_dim]`` and the weights ``[batch, heads, length, keys]``."""
        (length, batch, size), heads, keys = q.shape, self.num_heads, k.shape[0]
        q, k, v = (x.view(x.shape[0], batch * heads, self.head_dim).transpose(0, 1) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            q = q * math.sqrt(1.0 / self.head_dim)
            k = k.transpose(1, 2)
            weights = (torch.bmm(q, k) if mask is None else torch.baddbmm(mask, q, k)).softmax(-1)
            if dropout > 0:
                weights = F.dropout(weights, dropout)
            y = torch.bmm(weights, v).transpose(0, 1).reshape(length, batch, size)
            return y, weights.view(batch, heads, length, keys)
        if mask is not None:
            mask = mask.unsqueeze(0) if mask.shape[0] == 1 else mask.view(batch, heads, -1, keys)
        q, k, v = (x.view(batch, heads, -1, self.head_dim) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        return y.permute(2, 0, 1, 3).reshape(length, batch, size), None


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask that is added to the scores: ``-inf`` where a mask of booleans is true."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        _checks.fail("QuantMultiheadAttention", "mask", "be of booleans or floating", mask.dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
