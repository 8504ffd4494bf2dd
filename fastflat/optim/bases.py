# SPDX-License-Identifier: Apache-2.0
"""The fused base optimizers by themselves: one pass over all parameters, without a perturbation."""

from __future__ import annotations

from typing import Any

from fastflat.optim._fused import FusedOptimizer
from fastflat.optim._rules import BASES


class SGD(FusedOptimizer):
    """``u = g + weight_decay w; m = momentum m + (1 - dampening) u; w -= lr m`` (``u + momentum m`` with Nesterov).

    The options of ``torch.optim.SGD``, which it follows up to the order of additions; with ``decoupled=True`` weight
    decay is ``w *= 1 - lr weight_decay``. For ``average`` and the rest see :class:`FusedOptimizer`.
    """

    def __init__(self, params, lr: float = 1e-3, **options: Any):
        super().__init__(params, BASES["sgd"], lr=lr, **options)


class Adam(FusedOptimizer):
    """Adam (Kingma and Ba 2015, arXiv 1412.6980), or AMSGrad; the options of ``torch.optim.Adam``."""

    def __init__(self, params, lr: float = 1e-3, **options: Any):
        super().__init__(params, BASES["adam"], lr=lr, **options)


class AdamW(FusedOptimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101); as ``torch.optim.AdamW``."""

    def __init__(self, params, lr: float = 1e-3, **options: Any):
        super().__init__(params, BASES["adamw"], lr=lr, **options)


class Padam(FusedOptimizer):
    """``w -= lr sqrt(1 - beta2^t)/(1 - beta1^t) m/(sqrt(max v) + eps)^(2 partial)`` with decoupled weight decay.

    ``partial`` 1/2 is AMSGrad with eps inside the root, 0 is SGD with momentum. Source: Chen et al. 2020
    (arXiv 1806.06763).
    """

    def __init__(self, params, lr: float = 1e-3, **options: Any):
        super().__init__(params, BASES["padam"], lr=lr, **options)


class LARS(FusedOptimizer):
    """``m = momentum m + lr r (g + weight_decay w); w -= m`` with a ratio for each parameter,
    ``r = trust_coefficient |w| / (|g| + weight_decay |w| + eps)``, 1 where a norm is 0.

    Parameters of one axis or none (biases, normalisation) have a ratio of 1 unless ``adapt_vectors=True``. Source: You
    et al. 2017 (arXiv 1708.03888).
    """

    def __init__(self, params, lr: float = 1e-3, **options: Any):
        super().__init__(params, BASES["lars"], lr=lr, **options)


class LAMB(FusedOptimizer):
    """``u = m/(1 - beta1^t) / (sqrt(v/(1 - beta2^t)) + eps) + weight_decay w; w -= lr |w|/|u| u`` with a ratio for each
    parameter, 1 where a norm is 0.

    Parameters of one axis or none have a ratio of 1 unless ``adapt_vectors=True``. Source: You et al. 2020
    (arXiv 1904.00962).
    """

    def __init__(self, params, lr: float = 1e-3, **options: Any):
        super().__init__(params, BASES["lamb"], lr=lr, **options)


class Gadam(FusedOptimizer):
    """AdamW with an average of its iterates, evaluated in ``with opt.averaged():``.

    The running mean takes the weights once every ``average_every`` steps from step ``average_start`` on: published once
    an epoch from epoch 161 of 200 on, with a large learning rate held constant there. Batch normalisation needs its
    statistics taken anew for the mean (``torch.optim.swa_utils.update_bn``). Source: Granziol et al. 2020
    (arXiv 2003.01247).
    """

    def __init__(self, params, lr: float = 1e-3, *, average: str = "mean", **options: Any):
        super().__init__(params, BASES["adamw"], lr=lr, average=average, **options)


class GadamX(FusedOptimizer):
    """:class:`Padam` with an average of its iterates, as in :class:`Gadam`; ``partial`` 1/8."""

    def __init__(self, params, lr: float = 1e-1, *, average: str = "mean", **options: Any):
        super().__init__(params, BASES["padam"], lr=lr, average=average, **options)
