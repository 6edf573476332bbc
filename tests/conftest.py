"""One thread per test process.

Sums are added up in an order that depends on the number of threads, so only runs with the same
number can be equal to the bit; a forked process would otherwise have another number than its
parent.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
