"""The tokenizer of the demo model: byte-level BPE of exactly 4,096 tokens, and the chat template."""

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as Steps
from tokenizers.trainers import BpeTrainer

VOCABULARY = 4096

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PADDING = "<|pad|>"
SPECIAL = (END_OF_TEXT, TURN_START, TURN_END, PADDING)

# A line break takes the next line's indent with it, less the one blank that belongs to the word: "\n   " + " return".
_PIECES = r"[\r\n]+(?: +(?= \S))?|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}"
    "{{- '<|im_start|>' + role + '\\n' + (message['content'] | default('', true)) + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn the merges. All 256 bytes are tokens, so that any text can be written and read back."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Steps(
        [Split(Regex(_PIECES), behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must exist."""
    number = tokenizer.token_to_id(token)
    assert number is not None, f"{token} is not in the vocabulary"
    return number


def tokenizer_config(context: int) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": END_OF_TEXT,
        "eos_token": TURN_END,
        "pad_token": PADDING,
        "chat_template": CHAT_TEMPLATE,
    }


def render(conversation: Sequence[tuple[str, str]]) -> str:
    """What the chat template makes of a whole conversation."""
    return "".join(f"{TURN_START}{role}\n{content}{TURN_END}\n" for role, content in conversation)


def render_question(question: str) -> str:
    """What the chat template makes of one question that waits for its answer."""
    return render([("user", question)]) + f"{TURN_START}assistant\n"
