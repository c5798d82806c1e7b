"""One OpenMP thread for every process of the tests, before any of them imports torch.

Several processes run side by side as it is. With more threads each, those that wait for the others
at the end of a parallel loop spin, on cores that the others need: emulated kernels then take four
times the CPU time, on two cores.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
