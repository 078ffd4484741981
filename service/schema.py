"""The request shapes of the API. Parsed once, at the edge; what comes out is checked and has its final type.

Fields that OpenAI knows and we do not offer yet are refused by name, unless they hold the value that changes nothing. What
has no effect here is ignored: user, metadata, store, safety_identifier, prompt_cache_*, reasoning_effort, verbosity,
parallel_tool_calls, and every field nobody knows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from service.errors import ApiError, invalid

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1000
MAX_STOP_IDS = 64
MAX_BIASES = 1024
MAX_BIAS = 100
MAX_ALTERNATIVES = 20
MAX_MESSAGES = 4096
MAX_ID_DIGITS = 10
DEFAULT_COMPLETION_TOKENS = 16  # of a completion, not of a chat: OpenAI's
BIASES = {"type": "object", "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS}}
STRING, ID = {"type": "string"}, {"type": "integer", "minimum": 0}
STOPS = {"anyOf": [STRING, {"type": "array", "items": STRING, "maxItems": MAX_STOPS}]}
STOP_IDS = {"type": "array", "items": ID, "maxItems": MAX_STOP_IDS}
IDS = {"type": "array", "items": ID, "minItems": 1}
PROMPTS = {"anyOf": [STRING, {"type": "array", "items": STRING, "minItems": 1}, IDS, {"type": "array", "items": IDS}]}
CONTENT = {"anyOf": [STRING, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]}
AUTO = "auto"  # the tier that is usual for whoever asks
TIERS = {
    "auto": AUTO,
    "default": "default",
    "scale": "default",
    "flex": "flex",
    "priority": "priority",
    "fast": "priority",
}

# known to OpenAI, not offered here yet; the values are those that ask for nothing
Neutral = dict[str, tuple[Any, ...]]
NEUTRAL: Neutral = {
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "moderation": (None,),
    "suffix": (None, ""),
    # known to other servers: a client that sets them would be surprised to be served without
    "typical_p": (None, 1),
    "length_penalty": (None, 1),
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None,),
    "skip_special_tokens": (None, True),
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "include_stop_str_in_output": (None, False),
    "use_beam_search": (None, False),
    "continue_final_message": (None, False),
    "chat_template": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
    "grammar": (None, ""),
    "json_schema": (None,),
    "regex": (None, ""),
    "ebnf": (None, ""),
}


def without_default(schema: dict[str, Any]) -> None:
    """Ours is a value that no client could send."""
    schema.pop("default", None)


NO_DEFAULT = Field(json_schema_extra=without_default)


def stop_strings(value: Any) -> Any:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or an array of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"takes at most {MAX_STOPS} strings, not {len(stops)}")
    if not all(stops):
        raise ValueError("must not contain an empty string")
    if max(map(len, stops), default=0) > MAX_STOP_CHARACTERS:
        raise ValueError(f"takes strings of at most {MAX_STOP_CHARACTERS} characters")
    return tuple(stops)


def ids_that_stop(value: Any) -> Any:
    if value is None:
        return ()
    if not isinstance(value, list) or set(map(type, value)) - {int}:
        raise ValueError("must be an array of token ids")
    if len(value) > MAX_STOP_IDS:
        raise ValueError(f"takes at most {MAX_STOP_IDS} token ids, not {len(value)}")
    return tuple(value)


def biases(value: Any) -> Any:
    """Pairs, in the order of their ids. What adds nothing is left out."""
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and numbers")
    if len(value) > MAX_BIASES:
        raise ValueError(f"takes at most {MAX_BIASES} token ids, not {len(value)}")
    pairs = sorted((token_id(name), bias_of(name, bias)) for name, bias in value.items())
    return tuple((id, bias) for id, bias in pairs if bias)


def token_id(name: str) -> int:
    if len(name) > MAX_ID_DIGITS or not (name.isascii() and name.isdecimal()) or str(int(name)) != name:
        raise ValueError(f"has the key {name[:40]!r}, which is no token id")
    return int(name)


def bias_of(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not -MAX_BIAS <= value <= MAX_BIAS:
        raise ValueError(f"has a value for {name} that is no number from -{MAX_BIAS} to {MAX_BIAS}")
    return float(value)


def tier(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, str) or value not in TIERS:
        raise ValueError("must be one of 'auto', 'default', 'flex', 'priority', 'fast' and 'scale'")
    return TIERS[value]


def content_text(value: Any) -> Any:
    """Content in parts becomes one text, a part per line."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or an array of content parts")
    return "\n".join([part_text(part) for part in value])


def part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal"):
        name = f"of type '{kind}'" if isinstance(kind, str) else "without a type"
        raise ValueError(f"has a part {name}; this model takes text only: {{'type': 'text', 'text': '…'}}")
    text = part.get(kind)
    if not isinstance(text, str):
        raise ValueError(f"has a part of type '{kind}' without its text, which must be a string")
    return text


def null_means(default: Any) -> BeforeValidator:
    """An explicit null is the same as leaving the field out."""
    return BeforeValidator(lambda value: default if value is None else value)


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str | None, BeforeValidator(content_text), WithJsonSchema(CONTENT)] = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True) | {"content": self.content or ""}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: Annotated[bool, null_means(False)] = False


Penalty = Annotated[float, Field(ge=-2, le=2), null_means(0.0)]


class GenerateRequest(BaseModel, ABC):
    """What both families of routes have in common."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: Annotated[str, Field(min_length=1)]
    # where the client says nothing, the model's own defaults hold
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=0x7FFFFFFF)] = None  # 0 and -1: off
    seed: int | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(stop_strings), WithJsonSchema(STOPS), NO_DEFAULT] = ()
    stream: Annotated[bool, null_means(False)] = False
    stream_options: StreamOptions | None = None
    service_tier: Annotated[str | None, BeforeValidator(tier), WithJsonSchema({"enum": [*TIERS, None]})] = None
    n: Annotated[int, Field(ge=1, le=128), null_means(1)] = 1
    best_of: Annotated[int | None, Field(ge=1)] = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[
        tuple[tuple[int, float], ...], BeforeValidator(biases), WithJsonSchema(BIASES), NO_DEFAULT
    ] = ()
    # not OpenAI's
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=10)] = None
    min_tokens: Annotated[int, Field(ge=0, le=0x7FFFFFFF), null_means(0)] = 0
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(ids_that_stop), WithJsonSchema(STOP_IDS)] = ()
    ignore_eos: Annotated[bool, null_means(False)] = False
    return_token_ids: Annotated[bool, null_means(False)] = False

    neutral: ClassVar[Neutral] = NEUTRAL

    @field_validator("best_of")
    @classmethod
    def all_are_shown(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        if best_of is not None and best_of != info.data.get("n", best_of):
            raise ValueError("must be equal to 'n': every answer that is generated is shown")
        return best_of

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def begins_with_prompt(self) -> bool:
        return False

    @property
    def tells_of_tokens(self) -> bool:
        return self.return_token_ids or self.alternatives is not None

    @property
    @abstractmethod
    def limit_tokens(self) -> int | None:
        """How many tokens an answer may have, if the client says so."""

    @property
    def limit_param(self) -> str:
        """Where the client says it."""
        return "max_tokens"

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many likely tokens are told beside each one; None: no probabilities at all."""


def few_enough(value: Any) -> Any:
    """Counted before any of them is looked at: 200,000 messages would hold up everybody else."""
    if isinstance(value, list) and len(value) > MAX_MESSAGES:
        raise ValueError(f"takes at most {MAX_MESSAGES} messages, not {len(value)}")
    return value


class ChatRequest(GenerateRequest):
    messages: Annotated[list[Message], BeforeValidator(few_enough), Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: Annotated[bool, null_means(False)] = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_ALTERNATIVES)] = None

    neutral: ClassVar[Neutral] = NEUTRAL | {"echo": (None, False)}

    @field_validator("top_logprobs")
    @classmethod
    def beside_logprobs_only(cls, top_logprobs: int | None, info: ValidationInfo) -> int | None:
        if top_logprobs is not None and not info.data.get("logprobs", True):
            raise ValueError("may only be set when 'logprobs' is true")
        return top_logprobs

    @field_validator("messages")
    @classmethod
    def only_an_assistant_may_be_silent(cls, messages: list[Message]) -> list[Message]:
        for number, message in enumerate(messages):
            if message.content is None and message.role != "assistant":
                raise ValueError(f"needs content in message {number} (role '{message.role}')")
        return messages

    @property
    def limit_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_param(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


PROMPT_SHAPES = "must be a string, an array of strings, an array of token ids, or an array of those arrays"


def prompts(value: Any) -> Any:
    """One prompt or several, each a text or token ids: always a list of prompts.

    Of token ids only the first is looked at here. The others wait until it is known that they are not too many.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if type(value[0]) is int:
            return [value]
        if all(isinstance(one, str) for one in value):
            return value
        if all(isinstance(one, list) and one and type(one[0]) is int for one in value):
            return value
    raise ValueError(PROMPT_SHAPES)


def check_prompt_ids(ids: list[Any], vocabulary: int) -> None:
    """At the speed of C: there may be as many as the context holds. Raises ApiError."""
    if set(map(type, ids)) != {int}:
        raise invalid(f"'prompt' {PROMPT_SHAPES}.", "prompt")
    check_ids(ids, vocabulary, "prompt")


def check_ids(ids: Collection[int], vocabulary: int, param: str) -> None:
    """Raises ApiError when one of them is no token's."""
    for id in (min(ids), max(ids)) if ids else ():
        if not 0 <= id < vocabulary:
            raise invalid(f"'{param}' holds {id}, which is no token id: they are 0 to {vocabulary - 1}.", param)


class CompletionRequest(GenerateRequest):
    prompt: Annotated[
        list[Any], BeforeValidator(prompts), WithJsonSchema(PROMPTS)
    ]  # each a str or a list, whose first item is an int
    max_tokens: Annotated[int | None, Field(ge=0, json_schema_extra={"default": DEFAULT_COMPLETION_TOKENS})] = None
    echo: Annotated[bool, null_means(False)] = False
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_ALTERNATIVES)] = None

    neutral: ClassVar[Neutral] = NEUTRAL | {"top_logprobs": (None,)}

    @property
    def limit_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def begins_with_prompt(self) -> bool:
        return self.echo

    @property
    def only_scores(self) -> bool:
        """Nothing is wanted but the log probabilities of the prompt."""
        return self.max_tokens == 0 and self.echo and self.logprobs is not None


Parsed = TypeVar("Parsed", bound=GenerateRequest)


def parse_chat(body: dict[str, Any], max_choices: int) -> ChatRequest:
    """Raises ApiError with a sentence that names the field."""
    request = parse(ChatRequest, body)
    check_choices(1, request.n, max_choices)
    return request


def parse_completion(body: dict[str, Any], max_choices: int) -> CompletionRequest:
    """Raises ApiError with a sentence that names the field."""
    check_number(body.get("prompt"), max_choices)
    request = parse(CompletionRequest, body)
    check_choices(len(request.prompt), request.n, max_choices)
    return request


def check_choices(prompts: int, n: int, most: int) -> None:
    if prompts * n > most:
        product = f"{n}" if prompts == 1 else f"{prompts} prompts x {n} = {prompts * n}"
        raise invalid(f"'n' asks for too many answers: {product}; one request gets at most {most}.", "n")


def check_number(prompt: Any, most: int) -> None:
    """Counted before any of them is looked at. An array of ids is one prompt."""
    if isinstance(prompt, list) and len(prompt) > most and isinstance(prompt[0], str | list):
        raise invalid(f"'prompt' takes at most {most} prompts in one request, not {len(prompt)}.", "prompt")


def parse(shape: type[Parsed], body: dict[str, Any]) -> Parsed:
    for name in shape.neutral.keys() & body.keys():
        if not is_neutral(body[name], shape.neutral[name]):
            raise not_offered(name)
    if body.get("stream_options") is not None and not body.get("stream"):
        raise invalid("'stream_options' may only be set when 'stream' is true.", "stream_options")
    try:
        return shape.model_validate(body)
    except ValidationError as error:
        raise described(error) from error


def is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """To Python `true` is 1; to a client it is not."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def not_offered(name: str) -> ApiError:
    return invalid(f"'{name}' is not offered here yet. Please leave it out.", name, "unsupported_parameter")


SENTENCES = {
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be an array",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "greater_than": "must be greater than {gt:.12g}",
    "greater_than_equal": "must be at least {ge:.12g}",
    "less_than_equal": "must be at most {le:.12g}",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "finite_number": "must be a finite number",
    "literal_error": "must be one of {expected}",
    "missing": "is required",
}


def described(error: ValidationError) -> ApiError:
    """The first fault, as a sentence."""
    fault = error.errors(include_url=False, include_input=False)[0]
    context = fault.get("ctx", {})
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
    if fault["type"] == "value_error":
        says = str(context["error"])
    else:
        says = SENTENCES.get(fault["type"], fault["msg"]).format(**context)
    return invalid(f"'{name}' {says}.", name, "missing_required_parameter" if fault["type"] == "missing" else None)


def documented(shape: type[BaseModel]) -> dict[str, Any]:
    """What /openapi.json says about a route that reads its body itself."""
    schema = shape.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inlined(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return inlined(definitions[node["$ref"].rpartition("/")[2]])
            return {name: inlined(value) for name, value in node.items()}
        return [inlined(value) for value in node] if isinstance(node, list) else node

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined(schema)}}}}
