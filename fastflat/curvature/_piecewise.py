# SPDX-License-Identifier: Apache-2.0
"""Where a block of the Hessian is that of the Gauss-Newton matrix: outputs piecewise linear in the block.

``H = J^T H_out J + sum_i dL/dz_i d^2 z_i/dw^2``: the second term of a parameter's own block is zero where the outputs z
are piecewise linear in it, as behind ReLU, max-pooling, batch norm in eval mode and straight-through quantizers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils import _pytree as pytree

from fastflat.curvature._batch import Batch, called
from fastflat.curvature._problem import Problem
from fastflat.curvature._program import Program, Ref, Step, Untraceable
from fastflat.curvature._rules._constant import CONSTANT
from fastflat.curvature._rules._linear import LINEAR
from fastflat.curvature._tracing import Constants, trace

aten = torch.ops.aten

_LINEAR = LINEAR | {torch.ops.fastflat.fake_quantize.default}
#: Linear in the product of these two arguments, and in the others beside it.
_PRODUCTS = {
    aten.mul.Tensor: (0, 1),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.convolution.default: (0, 1),
    aten.native_batch_norm.default: (0, 1),
}
#: Arguments of batch norm that say whether it uses the batch's statistics, which couples rows and is not linear.
_TRAINING = {aten.native_batch_norm.default: 5}


def broken(problem: Problem, batch: Batch) -> str | None:
    """Why the outputs may not be piecewise linear in each single parameter; None where they are.

    Conservative: an operation that is not known to be linear counts as one that is not.
    """
    try:
        program = _outputs(problem, batch)
    except Untraceable as reason:
        return f"the model cannot be traced ({reason})"
    return _first_break(program, problem.names)


def _outputs(problem: Problem, batch: Batch) -> Program:
    """The forward pass as a program; its first inputs are the parameters."""
    held, buffers = problem.state()

    def function(_, params, held_values, buffer_values, tensors):
        params = [p.detach().requires_grad_() for p in params]
        state = dict(zip(problem.names, params, strict=True))
        state |= dict(zip(held, held_values, strict=True)) | dict(zip(buffers, buffer_values, strict=True))
        inputs, _ = batch.together(tensors)
        with torch.enable_grad(), Constants([*params, *held_values, *buffer_values, *tensors]):
            output = called(problem.model, state, inputs)
        return [z for z in pytree.tree_leaves(output) if isinstance(z, torch.Tensor)]

    return trace(function, problem.params, list(held.values()), list(buffers.values()), batch.tensors)


def _first_break(program: Program, names: Sequence[str]) -> str | None:
    # Bit b of `moves`: the result depends on parameter b.
    moves = [0] * len(program.steps)
    for b, position in enumerate(program.inputs[: len(names)]):
        moves[position] = 1 << b
    for position, step in enumerate(program.steps):
        if step.op is None or step.op in CONSTANT:
            continue
        depends = 0
        for read in step.reads:
            depends |= moves[read]
        bent = depends if not _known(step) else _both(step, moves)
        if bent:
            name = names[(bent & -bent).bit_length() - 1]
            return f"outputs are not piecewise linear in {name} ({_called(step)})"
        moves[position] = depends
    return None


def _known(step: Step) -> bool:
    if step.op in _TRAINING:
        return not step.args[_TRAINING[step.op]]
    if step.op is aten.div.Tensor:
        return not isinstance(step.args[1], Ref)
    return step.op in _LINEAR or step.op in _PRODUCTS


def _both(step: Step, moves: list[int]) -> int:
    """The parameters on which both factors of a product depend."""
    if step.op not in _PRODUCTS:
        return 0
    first, second = (step.args[i] for i in _PRODUCTS[step.op])
    return moves[first.step] & moves[second.step] if isinstance(first, Ref) and isinstance(second, Ref) else 0


def _called(step: Step) -> str:
    name = getattr(step.op, "name", lambda: str(step.op))()
    if step.op in _TRAINING and step.args[_TRAINING[step.op]]:
        return "batch norm in train mode"
    return f"{name} with it on both sides" if step.op in _PRODUCTS else name.removeprefix("aten::")
