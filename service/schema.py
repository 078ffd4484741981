"""The request shapes of the API. Parsed once, at the edge; what comes out is checked and has its final type.

Fields that OpenAI knows and we do not offer yet are refused by name, unless they hold the value that changes nothing. What
has no effect here is ignored: user, metadata, store, safety_identifier, prompt_cache_*, reasoning_effort, verbosity,
parallel_tool_calls, and every field nobody knows.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from service.errors import ApiError, invalid

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1000
MAX_MESSAGES = 4096
TIERS = {
    "auto": "default",
    "default": "default",
    "scale": "default",
    "flex": "flex",
    "priority": "priority",
    "fast": "priority",
}

# known to OpenAI, not offered here yet; the values are those that ask for nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "top_logprobs": (None,),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
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
    "min_p": (None, 0),
    "typical_p": (None, 1),
    "repetition_penalty": (None, 1),
    "length_penalty": (None, 1),
    "min_tokens": (None, 0),
    "stop_token_ids": (None, []),
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
}


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
    content: Annotated[str | None, BeforeValidator(content_text)] = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True) | {"content": self.content or ""}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: Annotated[bool, null_means(False)] = False


class GenerateRequest(BaseModel):
    """What both families of routes have in common."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: Annotated[str, Field(min_length=1)]
    # where the client says nothing, the model's own defaults hold
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=0x7FFFFFFF)] = None  # 0 and -1: off
    seed: int | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(stop_strings)] = ()
    stream: Annotated[bool, null_means(False)] = False
    stream_options: StreamOptions | None = None
    service_tier: Annotated[str | None, BeforeValidator(tier)] = None
    ignore_eos: Annotated[bool, null_means(False)] = False

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def few_enough(value: Any) -> Any:
    """Counted before any of them is looked at: 200,000 messages would hold up everybody else."""
    if isinstance(value, list) and len(value) > MAX_MESSAGES:
        raise ValueError(f"takes at most {MAX_MESSAGES} messages, not {len(value)}")
    return value


class ChatRequest(GenerateRequest):
    messages: Annotated[list[Message], BeforeValidator(few_enough), Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None

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


def check_ids(ids: list[Any], vocabulary: int) -> None:
    """At the speed of C: there may be as many as the context holds. Raises ApiError."""
    if set(map(type, ids)) != {int}:
        raise invalid(f"'prompt' {PROMPT_SHAPES}.", "prompt")
    for id in (min(ids), max(ids)):
        if not 0 <= id < vocabulary:
            raise invalid(f"'prompt' holds {id}, which is no token id: they are 0 to {vocabulary - 1}.", "prompt")


class CompletionRequest(GenerateRequest):
    prompt: Annotated[list[Any], BeforeValidator(prompts)]  # each a str or a list, whose first item is an int
    max_tokens: Annotated[int, null_means(16), Field(ge=0)] = 16
    echo: Annotated[bool, null_means(False)] = False


Parsed = TypeVar("Parsed", bound=GenerateRequest)


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    """Raises ApiError with a sentence that names the field."""
    if body.get("logprobs"):
        raise not_offered("logprobs")
    return parse(ChatRequest, body)


def parse_completion(body: dict[str, Any], max_prompts: int) -> CompletionRequest:
    """Raises ApiError with a sentence that names the field."""
    check_number(body.get("prompt"), max_prompts)
    if body.get("logprobs") is not None:  # here a number, and 0 asks for the chosen token's
        raise not_offered("logprobs")
    return parse(CompletionRequest, body)


def check_number(prompt: Any, most: int) -> None:
    """Counted before any of them is looked at. An array of ids is one prompt."""
    if isinstance(prompt, list) and len(prompt) > most and isinstance(prompt[0], str | list):
        raise invalid(f"'prompt' takes at most {most} prompts in one request, not {len(prompt)}.", "prompt")


def parse(shape: type[Parsed], body: dict[str, Any]) -> Parsed:
    for name in NEUTRAL.keys() & body.keys():
        if not is_neutral(body[name], NEUTRAL[name]):
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
    if name in ("n", "best_of"):
        return invalid(
            f"'{name}' must be 1: one answer per request is what is offered here.", name, "unsupported_value"
        )
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
