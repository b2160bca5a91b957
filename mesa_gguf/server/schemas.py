"""Requests, as OpenAI's API has them, with what this server knows besides. Fields that are not here are left alone, as other
servers do it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, field_validator

MAX_MESSAGES = 4096
MAX_STOP = 64
MAX_DOCUMENTS = 10_000  # as many as a list of files has
MAX_CHOICES = 16
MAX_SCHEMA = 256 * 1024  # characters of a response_format or of tools
TOKENS = 2**31 - 1

Number = Annotated[float, Field(allow_inf_nan=False)]
Mode = Literal["auto", "all", "each"] | Annotated[StrictInt, Field(ge=1, le=TOKENS)]
Id = Annotated[StrictStr, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore")


class StreamOptions(Body):
    include_usage: StrictBool = False


class FileReference(Body):
    file_id: Id | None = None
    file_data: StrictStr | None = None
    filename: Annotated[StrictStr, Field(max_length=1024)] | None = None


class TextPart(Body):
    type: Literal["text"]
    text: StrictStr


class FilePart(Body):
    type: Literal["file"]
    file: FileReference


class Message(Body):
    model_config = ConfigDict(extra="allow")  # tool_calls, name and the like go to the chat template

    role: Annotated[StrictStr, Field(min_length=1, max_length=64)]
    content: StrictStr | Annotated[list[Annotated[TextPart | FilePart, Field(discriminator="type")]], Field(max_length=MAX_MESSAGES)] | None = None  # fmt: skip


class Function(Body):
    model_config = ConfigDict(extra="allow")

    name: Annotated[StrictStr, Field(pattern="^[a-zA-Z0-9_.-]{1,256}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})


class Tool(Body):
    type: Literal["function"]
    function: Function


class ChosenFunction(Body):
    name: StrictStr


class ToolChoice(Body):
    type: Literal["function"]
    function: ChosenFunction


class ResponseFormat(Body):
    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema"]


class Sampling(Body):
    """What chat and plain completions share."""

    model: Annotated[StrictStr, Field(max_length=1024)] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1, le=TOKENS)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=1000)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=TOKENS)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[Number, Field(gt=0.01, le=100)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,10}$")], Annotated[Number, Field(ge=-100, le=100)]] | None = None  # fmt: skip
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=MAX_STOP)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[StrictStr, Field(max_length=256)] | None = None

    def given(self, *names: str) -> dict[str, Any]:
        """Those of these fields that have a value."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
)  # fmt: skip


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, le=TOKENS)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    documents: Annotated[list[Id], Field(max_length=MAX_DOCUMENTS)] | None = Field(
        None, description="Ids of files that the last message is about."
    )
    collection: Id | None = Field(None, description="A vector store, by id or name, that the messages are about.")
    read: Mode | None = Field(None, description="How much of the documents is read.")
    progress: StrictBool | None = Field(None, description="Chunks of a stream tell of the reading before the answer.")

    @field_validator("response_format", "tools")
    @classmethod
    def _small(cls, value: Any) -> Any:
        if len(repr(value)) > MAX_SCHEMA:
            raise ValueError(f"it has more than {MAX_SCHEMA} characters")
        return value


class CompletionRequest(Sampling):
    prompt: (
        StrictStr
        | Annotated[list[StrictStr], Field(min_length=1, max_length=128)]
        | Annotated[list[Annotated[StrictInt, Field(ge=0, le=TOKENS)]], Field(min_length=1, max_length=2**24)]
        | Annotated[list[Annotated[list[Annotated[StrictInt, Field(ge=0, le=TOKENS)]], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    )  # fmt: skip
    suffix: StrictStr | None = None
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None


class EmbeddingRequest(Body):
    model: Annotated[StrictStr, Field(max_length=1024)] | None = None
    input: (
        StrictStr
        | Annotated[list[StrictStr], Field(min_length=1, max_length=2048)]
        | Annotated[list[Annotated[StrictInt, Field(ge=0, le=TOKENS)]], Field(min_length=1, max_length=2**24)]
        | Annotated[list[Annotated[list[Annotated[StrictInt, Field(ge=0, le=TOKENS)]], Field(min_length=1)]], Field(min_length=1, max_length=2048)]
    )  # fmt: skip
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None
    user: Annotated[StrictStr, Field(max_length=256)] | None = None


Name = Annotated[StrictStr, Field(min_length=1, max_length=256)]


class StoreRequest(Body):
    name: Name | None = None
    file_ids: Annotated[list[Id], Field(max_length=1024)] | None = None


class MemberRequest(Body):
    file_id: Id
