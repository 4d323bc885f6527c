"""What a model's tokenizer makes of preference data, as plain values that go to JSON and back."""

from typing import Any, Literal

from pydantic import Field

from core.spec import SpecModel

Part = Literal["prompt", "chosen", "rejected"]


class TokenStatistics(SpecModel):
    """Token counts as the chat template writes the pairs, before anything is cut."""

    tokenizer: str = Field(description="the model, as it was named")
    pairs: int = Field(description="pairs that the report is about")
    measured_pairs: int
    rule: str = Field(description="which pairs were measured, in words")
    total: int = Field(
        description="tokens of all pairs: each prompt once and both answers; of a sample its mean "
        "times `pairs`"
    )
    is_estimate: bool = Field(description="whether `total` is from a sample")
    prompt_p50: int = Field(description="percentiles are nearest-rank, of the measured pairs")
    prompt_p95: int
    prompt_max: int
    completion_p50: int = Field(description="of chosen and rejected answers together")
    completion_p95: int
    completion_max: int
    max: int = Field(description="longest sequence: a prompt with the longer of its answers")


class Truncation(SpecModel):
    """The check `truncation`: what does not fit into `at` tokens."""

    check: Literal["truncation"] = "truncation"
    level: Literal["ok", "warn"]
    value: float = Field(ge=0.0, le=1.0, description="share of the measured pairs that lose tokens")
    threshold: float
    at: int = Field(description="longest sequence in tokens")
    at_is: Literal["model", "max_length"] = Field(
        description="whose limit `at` is: the model's positions, or the job's max_length"
    )
    count: int = Field(description="measured pairs that lose tokens")
    of: int = Field(description="measured pairs")
    prompts: int = Field(description="prompts that lose their beginning")
    responses: int = Field(description="answers that lose their end")
    dropped: int = Field(
        description="pairs that cannot be trained on: an answer has no tokens, or what is left of "
        "both answers is the same"
    )
    detail: str
    lines: tuple[int, ...] = Field(description="lines of the first such pairs in the upload")


class Refusals(SpecModel):
    """The check `chat_template`: conversations that the model's template refuses."""

    check: Literal["chat_template"] = "chat_template"
    level: Literal["warn"] = "warn"
    count: int
    of: int = Field(description="pairs that were put to it")
    detail: str = Field(description="what it says of the first of them")
    lines: tuple[int, ...]


class Segment(SpecModel):
    """A piece of the rendered text, with its place in it in characters."""

    part: Part
    kept: bool = Field(description="false: truncation cuts it, the model does not see it")
    start: int
    end: int
    tokens: int
    shortened: bool = Field(description="its middle is left out here (…); the model does see it")


class Rendered(SpecModel):
    """A pair through the chat template: prompt, chosen, rejected, one after the other.

    Decoded from token ids. The model sees prompt + chosen and prompt + rejected.
    """

    text: str
    segments: tuple[Segment, ...]


class PreviewPair(SpecModel):
    """One pair in all its forms."""

    why: Literal["first", "truncated"]
    raw: dict[str, Any] | None = Field(
        description="the row of the upload; null where it is not among the first of the file"
    )
    canonical: dict[str, Any]
    rendered: Rendered | None = Field(description="null where no model is named")


class TokenReport(SpecModel):
    """What a model sees of the data."""

    tokens: TokenStatistics
    truncation: Truncation
    refusals: Refusals | None = Field(
        default=None, description="null: none; a job stops at the first"
    )
    preview: tuple[PreviewPair, ...]
