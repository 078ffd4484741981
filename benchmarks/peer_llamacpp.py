"""llama.cpp's own server on a file of random weights: `python -m benchmarks.peer_llamacpp MODEL.gguf THREADS SLOTS CONTEXT`.

Says `port N` when it can be asked, and what it was built for; ends when its standard input does.
"""

from __future__ import annotations

import sys

import xllamacpp


def main(path: str, threads: int, slots: int, context_tokens: int) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_parallel = slots
    params.n_ctx = slots * context_tokens  # of all slots together
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_threads_http = slots + 2
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.fit_params = False
    server = xllamacpp.Server(params)
    print(f"built for {xllamacpp.get_system_info()}", flush=True)
    print(f"port {server.listening_address.rpartition(':')[2]}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
