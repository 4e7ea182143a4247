"""What clients may send: OpenAI's fields that this engine serves. An unknown field is an error, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from monitor.errors import RequestInvalid
from monitor.types import Sampling


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _utf8(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a surrogate pair; send valid Unicode") from None
    return value


Text = Annotated[str, AfterValidator(_utf8)]


class StreamOptions(_Body):
    include_usage: bool = False


class TextPart(_Body):
    type: Literal["text"]
    text: Text


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None
    refusal: str | None = None

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextFormat(_Body):
    type: Literal["text"]


Bias = Annotated[float, Field(ge=-100, le=100)]


class Generate(_Body):
    """The fields that chat and completions share."""

    model: Text
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    max_tokens: int | None = Field(None, ge=1)
    stop: Text | list[Text] | None = None
    logit_bias: dict[str, Bias] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    user: str | None = None

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 4 or not all(0 < len(s) <= 256 for s in stops):
            raise ValueError("give up to 4 stop strings of 1 to 256 characters")
        return value

    def sampling(self, limit: int, vocabulary: int, logprobs: int | None) -> Sampling:
        """raises: RequestInvalid for a logit_bias key that is not a token id"""
        bias = {}
        for key, value in (self.logit_bias or {}).items():
            if len(key) > 9 or not key.isascii() or not key.isdigit() or int(key) >= vocabulary:
                raise RequestInvalid(f"logit_bias has key {key[:32]!r}; use token ids below {vocabulary}", "logit_bias")
            bias[int(key)] = value
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=limit,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(stops),
            logit_bias=bias,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logprobs=logprobs,
        )


class ChatRequest(Generate):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: TextFormat | None = None

    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generate):
    prompt: Text | list[Text] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast("list[str | list[int]]", list(self.prompt))
