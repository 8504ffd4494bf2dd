# SPDX-License-Identifier: Apache-2.0
"""The glue over lists of tensors against the reference: the part of :mod:`glue_cases` with the optimizers' ops."""

import torch

from fastflat._ops.descent import HYPER, RULES
from fastflat.backends import reference
from tests.ops import list_cases

SHAPES = (*list_cases.SHAPES, (6, 33))


def scattered(tensors, how):
    """The same values in memory as kernels cannot take them: transposed, with gaps, off the 16-byte grid."""
    made = []
    for t, x in enumerate(tensors):
        kind = (t + how) % 4
        if kind == 0 and x.dim() > 1:
            made.append(torch.empty(x.shape[::-1], dtype=x.dtype).permute(*reversed(range(x.dim()))).copy_(x))
        elif kind == 1 and x.dim():
            made.append(torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2].copy_(x))
        elif kind == 2:
            made.append(torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x))
        else:
            made.append(x)
    return made


def lists_of(storage, weights_too=True):
    """Tensors of every layout; weights that are restored from a backup keep theirs, which the backup follows."""
    lists = list_cases.make(storage, SHAPES)
    if weights_too:
        lists.ws = scattered(lists.ws, 1)
    lists.gs, lists.firsts, lists.outs = (
        scattered(ts, how) for ts, how in ((lists.gs, 2), (lists.firsts, 3), (lists.outs, 0))
    )
    lists.states = [scattered(ts, how) for how, ts in enumerate(lists.states)]
    lists.averages = scattered(lists.averages, 3)
    return lists


def compare_sharpness(call):
    for storage in list_cases.STORAGES:
        for weights_too in (False, True):
            for rise in (*list_cases.RISES, list_cases.Rise("into", 1, seeded=True)):
                if rise.seeded and "fp16" in storage:
                    continue
                lists = lists_of(storage, weights_too and rise.mode != "backup")
                expected = lists.copy()
                call("sharpness_ascent_", *rise.arguments(lists))
                reference.sharpness_ascent_(*rise.arguments(expected))
                list_cases.assert_same(lists.tensors(), expected.tensors())
            lists = lists_of(storage, weights_too)
            gs, ws = ([t.nan_to_num(1.0, 1.0, 1.0) for t in ts] for ts in (lists.gs, lists.ws))
            for kind in ([0], [1], [2], [t % 3 for t in range(len(gs))]):
                args = (gs, ws if any(kind) else [], kind, 0.01)
                sums = call("sharpness_sums", *args)
                torch.testing.assert_close(sums, reference.sharpness_sums(*args), rtol=1e-12, atol=1e-30)
    sums, rho = torch.rand(5, 3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    for linf in (False, True):
        got, want = call("sharpness_scale", sums, rho, 0.1, linf), reference.sharpness_scale(sums, rho, 0.1, linf)
        torch.testing.assert_close(got, want, rtol=1e-15, atol=0)
    call("sharpness_ascent_", [], [], [], None, [], rho, [0], 0.0, None)


def refuse_sharpness(refused):
    ws, gs, kept = [torch.ones(3), torch.ones(4)], [torch.ones(3), torch.ones(4)], torch.zeros(128, dtype=torch.uint8)
    scale = torch.ones(2, dtype=torch.float64)
    right = {"ws": ws, "gs": gs, "outs": [], "backup": kept, "at": [0, 64], "scale": scale, "metric": [0]}
    right |= {"eta": 0.0, "state": None}
    for change, text in (
        ({"gs": []}, "gs must be as long as the list of weights, 2, got 0"),
        ({"gs": [torch.ones(3), torch.ones(5)]}, "gs must have the shape of the weight"),
        ({"gs": [torch.ones(3), torch.ones(4).double()]}, "gs must be float64 exactly where"),
        ({"gs": [torch.ones(3), torch.ones(4).int()]}, "gs must be float32, bfloat16"),
        ({"scale": torch.ones(1).double()}, "scale must have at least 2 values, got 1"),
        ({"scale": torch.ones(2)}, "scale must be contiguous float64"),
        ({"metric": [0, 0, 0]}, "metric must hold one value, or one a tensor, 2, got 3"),
        ({"metric": [3]}, "metric must lie in [0, 2], got 3"),
        ({"at": [0]}, "at must be as long as the list of weights, 2, got 1"),
        ({"backup": None}, "at must be empty without a backup"),
        ({"at": [0, 8]}, "at must be a multiple of 64 inside the backup, got 8"),
        ({"at": [0, 128]}, "at must be a multiple of 64 inside the backup, got 128"),
        ({"backup": kept.float()}, "backup must be contiguous uint8"),
        ({"backup": torch.zeros(200, dtype=torch.uint8)[1:]}, "backup must begin on a multiple of 8 bytes"),
        ({"outs": gs}, "outs and backup must not both be given"),
        (
            {"outs": [t.half() for t in gs], "ws": [t.bfloat16() for t in ws], "backup": None, "at": []},
            "outs must have",
        ),
        ({"state": torch.ones(2)}, "state must be int64"),
    ):
        refused(text, "sharpness_ascent_", *{**right, **change}.values())
    assert all(torch.equal(w, torch.ones_like(w)) for w in ws)
    assert not kept.any()
    refused("others must not be empty for kind 1", "sharpness_sums", gs, [], [1], 0.0)
    refused("kind must lie in [0, 2], got 7", "sharpness_sums", gs, gs, [7], 0.0)
    refused("sums must have shape [T, 3]", "sharpness_scale", scale, scale, 0.0, False)


def compare_descent(call):
    for storage in list_cases.STORAGES:
        for step in (*list_cases.STEPS, *(list_cases.STOCHASTIC if "bf16" in storage else ())):
            lists = lists_of(storage, not step.restores)
            expected = lists.copy()
            sums = call(step.op, *step.arguments(lists))
            wanted = getattr(reference, step.op)(*step.arguments(expected))
            list_cases.assert_same(lists.tensors(), expected.tensors())
            if wanted is not None:
                torch.testing.assert_close(sums, wanted, rtol=1e-12, atol=0, equal_nan=True)
    sums = torch.rand(2, 3, 3, dtype=torch.float64)
    for rule in RULES.values():
        for skip in (0.0, 1.0):
            steps = torch.tensor([0.0, 5.0, 9.0], dtype=torch.float64)
            numbers = (torch.rand(2, len(HYPER), dtype=torch.float64), torch.tensor([1, 0, 1]))
            rest = (torch.tensor([0.2, 0.8, skip], dtype=torch.float64), *sums, rule)
            same_steps = steps.clone()
            rows = call("descent_rows_", *numbers, steps, *rest)
            list_cases.assert_same([rows], [reference.descent_rows_(*numbers, same_steps, *rest)])
            assert torch.equal(steps, same_steps)


def refuse_descent(refused):
    lists = list_cases.make("fp32", ((3,), (4,)), special=False)
    lists.outs = [torch.zeros(n, dtype=torch.bfloat16) for n in (3, 4)]
    before = lists.copy()
    rows, sums = list_cases.rows(2, "adam", lr=0.1), torch.ones(2, 3, dtype=torch.float64)
    m, v, x = lists.states
    head = {"ws": lists.ws, "outs": lists.outs, "backup": lists.backup, "at": lists.at}
    gradients = {"gs": lists.gs, "firsts": lists.firsts}
    tail = {"averages": lists.averages, "rows": rows}
    sgd = {**head, **gradients, "momenta": m, **tail, "state": None}
    adam = {**head, **gradients, "means": m, "squares": v, "largest": x, **tail, "padam": False, "state": None}
    moments = {
        "ws": lists.ws,
        "backup": lists.backup,
        "at": lists.at,
        **gradients,
        "means": m,
        "squares": v,
        "rows": rows,
    }
    lamb = {**head, "means": m, "squares": v, **tail, "sums": sums, "state": None}
    for op, right, change, text in (
        ("sgd", sgd, {"rows": rows[:1]}, "rows must be contiguous float64 with 32 values"),
        ("sgd", sgd, {"at": lists.at[:1]}, "at must be as long as the list of weights"),
        ("sgd", sgd, {"gs": []}, "gs must be as long as the list of weights, 2, got 0"),
        ("sgd", sgd, {"firsts": lists.firsts[:1]}, "firsts must be as long as the list of weights, 2, or empty, got 1"),
        ("sgd", sgd, {"momenta": [t.half() for t in m]}, "momenta must be float32, or float64"),
        ("sgd", sgd, {"averages": [t[1:] for t in m]}, "averages must have the shape of the weight"),
        ("sgd", sgd, {"outs": [t.double() for t in m]}, "outs must be float64 exactly where"),
        ("sgd", sgd, {"state": torch.zeros(3, dtype=torch.int64)}, "state must be int64"),
        ("adam", adam, {"means": []}, "means must be as long as the list of weights, 2, got 0"),
        ("adam", adam, {"largest": x[:1]}, "largest must be as long as"),
        ("lamb_moments", moments, {"squares": []}, "squares must be as long as"),
        ("lamb", lamb, {"sums": sums[:1]}, "sums must be contiguous float64 with 6 values"),
    ):
        refused(text, f"descent_{op}_", *{**right, **change}.values())
    list_cases.assert_same(lists.tensors(), before.tensors())
    number, group = torch.zeros(2, len(HYPER), dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    two, mix = torch.ones(2, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    right = {"hyper": number, "group": group, "steps": two, "mix": mix, "g": None, "w": None, "rule": 0}
    for change, text in (
        ({"hyper": number[:, 1:]}, "hyper must have shape [G, 12]"),
        ({"group": group.int()}, "group must be contiguous int64"),
        ({"steps": mix}, "steps must be contiguous float64 with 2 values"),
        ({"mix": two}, "mix must be contiguous float64 with 3 values"),
        ({"rule": 5}, "rule must lie in [0, 4], got 5"),
        ({"rule": RULES["lars"]}, "lars must have the sums of gradients and weights"),
        ({"rule": RULES["lars"], "g": sums, "w": sums[:1]}, "of_weights must be contiguous float64 with 6 values"),
    ):
        refused(text, "descent_rows_", *{**right, **change}.values())
    assert torch.equal(two, torch.ones_like(two))
