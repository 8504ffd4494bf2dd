# SPDX-License-Identifier: Apache-2.0
"""LSTM and GRU with quantized weights and input: :class:`QuantLSTM`, :class:`QuantGRU`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastflat import _checks
from fastflat.quant._layer import Input, QuantLayer

#: Hidden state: h, or (h, c).
State = Tensor | tuple[Tensor, Tensor]


class _Recurrent(QuantLayer):
    """What the recurrent layers share. The recursion is PyTorch's fused call, given the quantized weights."""

    inputs = (Input("input_quantizer", "input_size", (-1,)),)
    casts_weight = False
    _kernel: Callable

    @classmethod
    def weight_names(cls, module: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in module._flat_weights_names if name.startswith("weight_"))

    def forward(self, x: Tensor | PackedSequence, hx: State | None = None) -> tuple[Tensor | PackedSequence, State]:
        packed = isinstance(x, PackedSequence)
        data, batch_sizes, order, back = x if packed else (x, None, None, None)
        if not packed and data.dim() not in (2, 3):
            _checks.fail(type(self).__name__, "x", "have 2 axes, or 3 with a batch", data.dim())
        if self.input_quantizer is not None:
            data = self.input_quantizer(data)
        batch_axis = 0 if self.batch_first else 1
        alone = not packed and data.dim() == 2
        if alone:
            data = data.unsqueeze(batch_axis)
            hx = None if hx is None else _each(hx, lambda h: h.unsqueeze(1))
        if hx is None:
            hx = self._zeros(data, batch_sizes)
        else:
            hx = self.permute_hidden(hx, order)
        self.check_forward_args(data, hx, batch_sizes)

        names = self._flat_weights_names
        weights = [self.quantized(n) if n.startswith("weight_") else getattr(self, n) for n in names]
        settings = (weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if packed:
            y, *last = self._kernel(data, batch_sizes, hx, *settings)
            y = PackedSequence(y, batch_sizes, order, back)
        else:
            y, *last = self._kernel(data, hx, *settings, self.batch_first)
        state = self.permute_hidden(tuple(last) if len(last) > 1 else last[0], back)
        return (y.squeeze(batch_axis), _each(state, lambda h: h.squeeze(1))) if alone else (y, state)


class QuantLSTM(_Recurrent, nn.LSTM):
    """``nn.LSTM`` whose every ``weight_ih``, ``weight_hh`` (and ``weight_hr``) is quantized, and its input.

    Each weight ``p`` has a quantizer of its own, ``p_quantizer`` (``weight_ih_l0_quantizer``), with the scale
    ``[4 hidden_size]`` for ``axis=0``: one for each row of each gate. ``input_quantizer`` quantizes x before the first
    layer; hidden states, the inputs of further layers and biases stay in floating point, for the recursion is PyTorch's
    one fused call. Packed sequences, initial states, projections and both directions work as in ``nn.LSTM``, with the
    same results when the quantizers are off. On a GPU cuDNN copies the weights together in each call.

    Shapes: those of ``nn.LSTM``.
    """

    _kernel = staticmethod(torch.lstm)

    def _zeros(self, x: Tensor, batch_sizes: Tensor | None) -> State:
        h, c = self.get_expected_hidden_size(x, batch_sizes), self.get_expected_cell_size(x, batch_sizes)
        return x.new_zeros(h), x.new_zeros(c)


class QuantGRU(_Recurrent, nn.GRU):
    """``nn.GRU`` with quantized weights and input; as :class:`QuantLSTM`, with the scale ``[3 hidden_size]`` for
    ``axis=0``.

    Shapes: those of ``nn.GRU``.
    """

    _kernel = staticmethod(torch.gru)

    def _zeros(self, x: Tensor, batch_sizes: Tensor | None) -> State:
        return x.new_zeros(self.get_expected_hidden_size(x, batch_sizes))


def _each(state: State, change: Callable[[Tensor], Tensor]) -> State:
    return tuple(change(h) for h in state) if isinstance(state, tuple) else change(state)
