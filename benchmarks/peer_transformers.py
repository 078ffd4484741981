"""transformers in a plain generation loop with its KV cache: `python -m benchmarks.peer_transformers CONFIG.json THREADS`.

Random weights in bfloat16, greedy. Prints tokens per second as one JSON line.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.speeds import ANSWER_TOKENS, CONCURRENT, IDS, LONG_PROMPT_TOKENS, LONG_PROMPTS, PROMPT_TOKENS


def generate(model: LlamaForCausalLM, batch: int, prompt_tokens: int, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and from it to the last."""
    ids = torch.randint(IDS.start, IDS.stop, (batch, prompt_tokens))
    cache, began, first_at = None, time.perf_counter(), 0.0
    for _ in range(tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        first_at = first_at or time.perf_counter()
    return first_at - began, time.perf_counter() - first_at


@torch.inference_mode()
def main(config: str, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig.from_json_file(config)).eval()
    generate(model, CONCURRENT, PROMPT_TOKENS, 4)
    prefills = [generate(model, 1, LONG_PROMPT_TOKENS, 1)[0] for _ in range(LONG_PROMPTS)]
    decoded = {batch: batch * (ANSWER_TOKENS - 1) for batch in (1, CONCURRENT)}
    speeds = {
        batch: count / generate(model, batch, PROMPT_TOKENS, ANSWER_TOKENS)[1] for batch, count in decoded.items()
    }
    prefill = LONG_PROMPT_TOKENS / statistics.median(prefills)
    print(json.dumps({"alone": speeds[1], "together": speeds[CONCURRENT], "prefill": prefill}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
