# SPDX-License-Identifier: Apache-2.0
"""Which combination of methods for which goal on a low-bit network: parts, trainings, goals, and the search.

Parts (``parts``) are drop-ins of the methods; a training (``training``) is one combination for one condition; a goal
(``catalogue``) says what chooses and what is reported; ``search`` trains; ``answers`` says what the runs show.
"""
