"""What the memory and the cores give at this moment: `python -m benchmarks.probe THREADS DTYPE`, as one JSON line.

A process of its own: it begins with nothing in its caches and leaves no threads behind.
"""

from __future__ import annotations

import json
import sys

import torch

from worker.native.machine import MEGABYTE, matmul_rate, read_bandwidth

PROBE_BYTES = 300 * MEGABYTE  # a small model's weights, beyond any cache


def main(threads: int, dtype: str) -> None:
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    bandwidth = read_bandwidth(PROBE_BYTES, device)
    flops = matmul_rate(1024, device, getattr(torch, dtype))
    print(json.dumps({"bytes_per_second": bandwidth, "flops_per_second": flops}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
