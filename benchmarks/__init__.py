# SPDX-License-Identifier: Apache-2.0
"""Throughput side by side with other implementations; installed as ``fastflat.benchmarks``.

``cases``: what is measured, one module per op family, with the bytes that it must move; ``operations``: its arithmetic.
``peers``: who computes it. ``overview``: the slice of every family that a whole run measures.
``devices``, ``timers``, ``measure``: where and how it is timed, in interleaved rounds. ``roofline``: their best.
``gate``: no timing of wrong results. ``run``, ``step``, ``products``: rows of kernels, training steps, matrix products.
``audited``: GPU kernels that have not run. ``machine``: where it ran. ``report``, ``sections``, ``schema.json``:
records and tables; ``comparison``: two of them; ``page``, ``plots``: HTML; ``figures``: tables and figures of the docs.
"""
