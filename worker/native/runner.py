"""The torch engine: sequences, their cache, and one forward pass per plan."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scheduler.batch import Entry, Kind, StepPlan
from scheduler.messages import Logprobs, Request
from worker.engine import StepResult
from worker.files import read_config
from worker.native.blocks import BLOCK_TOKENS, BlockTable, PagedCache
from worker.native.config import DecoderConfig
from worker.native.cpu.decoder import CpuCache, CpuDecoder
from worker.native.cpu.pack import BITS, Kernels
from worker.native.cpu.program import AS_STORED, load_packed
from worker.native.decoder import Decoder, Outcome
from worker.native.forms import open_checkpoint
from worker.native.inputs import Span
from worker.native.linear import choose_products
from worker.native.loader import DTYPES, load_weights, tensor_shapes
from worker.native.logprobs import logprobs_of
from worker.native.machine import choose_threads
from worker.native.penalties import Past, past_of
from worker.native.progress import LoadingBar
from worker.native.sampler import is_greedy, sample
from worker.native.topology import allowed_cpus, available_cpus, physical_cores, thread_counts

KINDS = (Kind.DECODE, Kind.PREFILL)
TOLD_AT_ONCE = 128  # prompt tokens: their logits take 79 MB for a vocabulary of 150,000
LARGE_BYTES = 64 << 20
ROOM_TOKENS = 2048  # of output that a sequence finds room for; answers that are longer are rare


@dataclass(slots=True)
class Sequence:
    """One running request: every token known so far, prompt first, and where its keys and values lie."""

    request: Request
    tokens: list[int]
    past: Past | None  # for requests whose draws depend on it
    table: BlockTable = field(default_factory=BlockTable)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)  # of its second token on, until they are delivered

    @property
    def expected_tokens(self) -> int:
        request = self.request
        return len(request.prompt) + min(request.max_tokens - request.resumed_tokens, ROOM_TOKENS)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Until it has drawn its first token, of this run or an earlier one."""
        asks = self.request.prompt_logprobs and self.request.logprobs is not None
        return asks and not self.request.resumed_tokens and len(self.tokens) == len(self.request.prompt)

    def add(self, token: int) -> None:
        """A token was drawn."""
        self.tokens.append(token)
        if self.past is not None:
            self.past.add([token])


class NativeEngine:
    """A stepwise engine (see `worker/engine.py`) for the checkpoints of `config.FAMILIES`.

    `config` is the raw config.json, `block_bytes` the KV cache of one block over all layers, `kv_cache_bytes` that of
    all blocks, `weight_bytes` and `parameters` count a tied head once, `context_tokens` is the longest a sequence can get,
    `device` and `dtype` are names that `load` would take: of several formats, that of most weights; `held_form` names them all.
    """

    block_tokens = BLOCK_TOKENS

    def __init__(
        self,
        config: dict[str, Any],
        shape: DecoderConfig,
        decoder: Decoder | CpuDecoder,
    ) -> None:
        cache = decoder.cache
        self.config = config
        self.context_tokens = decoder.context_tokens
        self.num_blocks = cache.num_blocks
        self.block_bytes = cache.block_bytes
        self.kv_cache_bytes = cache.num_blocks * cache.block_bytes
        self.weight_bytes = sum(tensor.nbytes for tensor in decoder.weights.tensors())
        self.parameters = sum(math.prod(size) for size in tensor_shapes(shape).values())
        self.device = str(decoder.device)
        self.dtype = decoder.dtype_name
        self.held_form = " and ".join(decoder.weights.formats) if isinstance(decoder, CpuDecoder) else self.dtype
        self._cache = cache
        self._decoder = decoder
        self._sequences: dict[int, Sequence] = {}

    @classmethod
    @torch.inference_mode()
    def load(
        cls,
        path: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        kv_cache_bytes: int = 1 << 30,
        threads: int | None = None,
        packs: bool = True,
        library: ctypes.CDLL | None = None,
    ) -> NativeEngine:
        """Reads a checkpoint directory, or makes up weights for a config's file.

        ValueError with a sentence that helps for all that cannot work.

        `device`: cpu, cuda or cuda:n. `dtype`: float32, bfloat16 or float16; with `library`, the C step's, which computes in
        bfloat16 and the formats of few bits on a CPU, also int8 or int4, or AS_STORED in the file. `threads`: on a CPU; None measures whether more than one
        pays. `packs`: a second copy of the weights may be made where torch is then faster.
        """
        path = Path(path)
        config = read_config(path)
        shape = DecoderConfig.from_dict(config)
        where = torch.device(device)
        if threads and where.type == "cpu":
            torch.set_num_threads(threads)
        decoder: Decoder | CpuDecoder
        with open_checkpoint(path, shape) as checkpoint, LoadingBar() as progress:
            if library is not None and where.type == "cpu" and dtype in (*BITS, AS_STORED):
                kernels = Kernels(library, threads or available_cpus())
                packed = load_packed(checkpoint, shape, dtype, kernels, progress)
                decoder = CpuDecoder(shape, packed, CpuCache(shape, kv_cache_bytes), kernels)
            else:
                products = choose_products(where, DTYPES[dtype], packs)
                weights = load_weights(checkpoint, shape, where, DTYPES[dtype], products, progress)
                decoder = Decoder(shape, weights, PagedCache(shape, kv_cache_bytes, where, weights.norm.dtype))
        engine = cls(config, shape, decoder)
        if threads is None and where.type == "cpu":
            engine._choose_threads()
        return engine

    @property
    def free_blocks(self) -> int:
        return self._cache.allocator.free_blocks

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """See `worker.engine.Engine`. ValueError for a plan that contradicts what the engine knows of its sequences."""
        self._change_hands(plan)
        if not plan.entries:
            return StepResult()
        spans = [self._span(entry) for entry in plan.entries]
        self._cache.clear_new()
        outcome = self._decoder.run(spans, self._needs_logits(plan))
        for index, row in outcome.told:
            self._tell_prompt(plan.entries[index], outcome.hidden[row:])
        return self._deliver(plan, outcome)

    def _needs_logits(self, plan: StepPlan) -> bool:
        """Whether the best token is not all that somebody who gets one needs to know."""
        sequences = [self._sequences[entry.key] for entry in plan.entries if entry.delivers]
        return any(
            sequence.past is not None
            or sequence.request.logprobs is not None
            or not is_greedy(sequence.request.sampling)
            for sequence in sequences
        )

    def _change_hands(self, plan: StepPlan) -> None:
        try:
            for key, place, number in plan.kept:
                self._cache.keep(self._sequences[key].table, place, number)
        finally:  # whatever fails: nobody says a second time what may go
            for key in plan.stop:
                self._stop(key)
            for number in plan.evicted:
                self._cache.evict(number)
        for request in plan.start:
            self._start(request)
        for key, numbers in plan.shared:
            self._cache.go_on(self._sequences[key].table, numbers)

    def _stop(self, key: int) -> None:
        sequence = self._sequences.pop(key, None)
        if sequence is not None:  # a request may be cancelled before it ever started
            self._cache.truncate(sequence.table, 0)

    def _start(self, request: Request) -> None:
        if request.key in self._sequences:
            raise ValueError(f"sequence {request.key} is started twice")
        vocab = self._decoder.config.vocab
        if not len(request.prompt) or not 0 <= min(request.prompt) <= max(request.prompt) < vocab:
            raise ValueError(f"sequence {request.key}: a prompt is one token or more, each below {vocab}")
        self._sequences[request.key] = Sequence(request, list(request.prompt), past_of(request, vocab))

    def _span(self, entry: Entry) -> Span:
        """Checks an entry against its sequence and gives it blocks. Positions already computed are computed anew."""
        if entry.kind not in KINDS:
            raise ValueError(f"{entry}: kind is none of {', '.join(KINDS)}")
        sequence = self._sequences.get(entry.key)
        if sequence is None:
            raise ValueError(f"{entry}: not started")
        table, stop = sequence.table, entry.position + entry.query_tokens
        if not 0 <= entry.position <= table.tokens or not entry.position < stop <= len(sequence.tokens):
            raise ValueError(f"{entry}: {table.tokens} of {len(sequence.tokens)} known tokens are in the cache")
        if stop > self.context_tokens:
            raise ValueError(f"{entry}: the context is {self.context_tokens} tokens")
        if entry.delivers and stop != len(sequence.tokens):
            raise ValueError(f"{entry}: delivers, but {len(sequence.tokens)} tokens are known already")
        if entry.position < table.tokens:
            self._cache.truncate(table, entry.position)
        self._cache.grow(table, stop, min(sequence.expected_tokens, self.context_tokens))
        tokens = sequence.tokens[entry.position : stop]
        return Span(table, entry.position, tokens, entry.delivers, sequence.wants_prompt_logprobs)

    def _tell_prompt(self, entry: Entry, hidden: torch.Tensor) -> None:
        """Keeps the log probabilities of the prompt's tokens that the rows of a chunk predict, once each."""
        sequence = self._sequences[entry.key]
        prompt, told = sequence.request.prompt, sequence.prompt_logprobs
        stop = min(entry.position + entry.query_tokens, len(prompt) - 1)  # the last row predicts what will be drawn
        while len(told) < stop:
            at = len(told)
            tokens = prompt[at + 1 : min(at + TOLD_AT_ONCE, stop) + 1]
            first = at - entry.position
            logits = self._decoder.logits(hidden[first : first + len(tokens)])
            told += logprobs_of(logits, tokens, [sequence.request.logprobs or 0] * len(tokens))

    def _deliver(self, plan: StepPlan, outcome: Outcome) -> StepResult:
        """Draws a token for everybody who gets one, and makes it the next known token of its sequence."""
        keys = [plan.entries[i].key for i in outcome.delivering]
        sequences = [self._sequences[key] for key in keys]
        drawn, told = outcome.best or [], {}
        if outcome.logits is not None:
            settings = [sequence.request.sampling for sequence in sequences]
            positions = [len(sequence.tokens) for sequence in sequences]
            drawn = sample(outcome.logits, settings, positions, [sequence.past for sequence in sequences])
            told = _tell(keys, sequences, outcome.logits, drawn)
        for sequence, token in zip(sequences, drawn, strict=True):
            sequence.add(token)
        return StepResult({key: [token] for key, token in zip(keys, drawn, strict=True)}, told)

    @property
    def threads(self) -> int:
        """That compute, on a CPU."""
        return self._decoder.threads

    def own_flops(self) -> float:
        """Operations per second of its own products, where torch does not compute them; else 0."""
        return self._decoder.product_flops() if isinstance(self._decoder, CpuDecoder) else 0.0

    @property
    def read_bytes(self) -> int:
        """Of packed weights, what a step reads; else 0."""
        return self._decoder.weights.read_bytes if isinstance(self._decoder, CpuDecoder) else 0

    @property
    def weights(self) -> list[torch.Tensor]:
        """Every tensor once."""
        return self._decoder.weights.tensors()

    def _choose_threads(self) -> None:
        """Times a decode step of a few short sequences with several numbers of threads."""
        is_large = self.weight_bytes > LARGE_BYTES  # its step is all weights, and prompts would take seconds
        tokens = min(1 if is_large else 65, self.context_tokens)
        count = max(1, min(8, self.num_blocks * BLOCK_TOKENS // (tokens + BLOCK_TOKENS)))
        requests = [Request(id=i, gateway=-1, prompt=[0] * tokens, max_tokens=1) for i in range(count)]
        keys = tuple(request.key for request in requests)  # negative: no real request has such a key
        prefill = tuple(Entry(key, Kind.PREFILL, 0, tokens - 1, False) for key in keys) if tokens > 1 else ()
        decode = StepPlan(tuple(Entry(key, Kind.DECODE, tokens - 1, 1, True) for key in keys))

        def step() -> None:
            self.run(decode)
            for key in keys:
                self._sequences[key].tokens.pop()  # so that the next step is the same one

        self.run(StepPlan(prefill, start=tuple(requests)))
        counts = thread_counts(available_cpus(), physical_cores(allowed_cpus()))
        choose_threads(step, counts, self._decoder.set_threads)
        self.run(StepPlan(stop=keys))


def _tell(
    keys: list[int], sequences: list[Sequence], logits: torch.Tensor, drawn: list[int]
) -> dict[int, list[Logprobs]]:
    """By key, the log probabilities of drawn tokens, in front of the first one's those of the prompt's."""
    asked = [i for i, sequence in enumerate(sequences) if sequence.request.logprobs is not None]
    if not asked:
        return {}
    counts = [sequences[i].request.logprobs or 0 for i in asked]
    rows = logprobs_of(logits[asked], [drawn[i] for i in asked], counts)
    told = {}
    for i, row in zip(asked, rows, strict=True):
        told[keys[i]] = [*sequences[i].prompt_logprobs, row]
        sequences[i].prompt_logprobs.clear()
    return told
