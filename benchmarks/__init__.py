# SPDX-License-Identifier: Apache-2.0
"""Throughput side by side with other implementations; installed as ``fastflat.benchmarks``.

``cases``: what is measured, one module per op family, with the bytes that it must move.
``peers``: who computes it. ``measure``: interleaved rounds. ``gate``: no timing of wrong results.
``step``: a whole training step. ``machine`` and ``report``: where it ran, and the table.
"""
