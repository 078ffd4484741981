"""The draft-sized sibling of the demo model: its sizes, what it learns from its teacher, how often the two agree."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from worker.native.demo.generate import answer
from worker.native.demo.model import Llama, Shape

# With the tokenizer's files and the card just under 1 MB; nearly three quarters are the embedding, which is the head too.
DRAFT_SHAPE = Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=192)
DRAFT_TOKENS = 4  # drafted for each verification
_ANSWER_TOKENS = 128
_ENDS = (0, 2)  # <|endoftext|>, <|im_end|>


@dataclass(frozen=True)
class Agreement:
    """How often the draft's most likely token is the teacher's, by kind of row, and what that is worth."""

    top_1: dict[str, float]  # share of positions
    accepted: float  # drafted tokens per verification, of DRAFT_TOKENS, greedy


def load_llama(folder: Path, shape: Shape) -> Llama:
    """The weights of a folder that `export` wrote, in float32."""
    model = Llama(shape)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval().requires_grad_(False)


def taught_loss(draft: Llama, teacher: Llama, ids: Tensor) -> Tensor:
    """Mean divergence of the draft's next-token distribution from the teacher's, in nats per token."""
    with torch.no_grad():
        wanted = F.log_softmax(teacher(ids[:, :-1]).flatten(0, 1).float(), dim=-1)
    given = F.log_softmax(draft(ids[:, :-1]).flatten(0, 1).float(), dim=-1)
    return F.kl_div(given, wanted, log_target=True, reduction="batchmean")


def measure_agreement(draft: Llama, teacher: Llama, rows: Tensor, prompts: Sequence[Sequence[int]]) -> Agreement:
    """On rows of text and chat in turn, and on the teacher's own greedy answers."""
    shares = [agreed(draft, teacher, row[:-1]).mean() for row in rows]
    answers = [greedy_agreement(draft, teacher, prompt) for prompt in prompts]
    accepted, verifications = np.sum([accepted_drafts(answer) for answer in answers], axis=0)
    kinds = {
        "text": np.array(shares[::2]),
        "chat": np.array(shares[1::2]),
        "its greedy answers": np.concatenate(answers),
    }
    return Agreement({kind: float(np.mean(share)) for kind, share in kinds.items()}, float(accepted / verifications))


def greedy_agreement(draft: Llama, teacher: Llama, prompt: Sequence[int]) -> np.ndarray:
    """For each token of the teacher's greedy answer, its end too: would the draft have chosen it?"""
    written = answer(teacher, prompt, _ENDS, _ANSWER_TOKENS)
    return agreed(draft, teacher, torch.tensor([*prompt, *written]))[len(prompt) - 1 :]


@torch.no_grad()
def agreed(draft: Llama, teacher: Llama, ids: Tensor) -> np.ndarray:
    """Whether both find the same token most likely after each of `ids`."""
    row = ids.unsqueeze(0)
    return (draft(row).argmax(-1) == teacher(row).argmax(-1)).squeeze(0).numpy()


def accepted_drafts(agreed: np.ndarray, draft_tokens: int = DRAFT_TOKENS) -> tuple[int, int]:
    """Drafted tokens that are accepted, and verifications needed, to write what the teacher writes greedily.

    `agreed` says of each token whether the draft would have chosen it. A verification accepts the drafts before the
    first wrong one and adds a token of the teacher's.
    """
    accepted = verifications = position = 0
    while position < len(agreed):
        window = agreed[position : position + draft_tokens]
        run = len(window) if window.all() else int(window.argmin())
        accepted, verifications, position = accepted + run, verifications + 1, position + run + 1
    return accepted, verifications
