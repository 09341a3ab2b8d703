"""The parameters of one picture, as the hosted API names and bounds them: one place for all who ask for pictures."""

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fulgurite.errors import RequestError

LEAST_SIDE, MOST_SIDE = 256, 2048  # pixels
MOST_STEPS = 20
SEEDS = 2**64
DEFAULT_GUIDANCE = 7.5  # as the model's card says
LONGEST_PROMPT = 100_000  # characters; what the text encoders cannot read of it is cut, and a note says so
NULLABLE = {"negative_prompt", "seed", "decoder"}  # in which null is what many programs send for nothing
Decoder = Literal["full", "fast"]  # the VAE's own, or a tiny one, quicker and a little less exact


def whole(value: Any) -> Any:
    """512.0 is the integer 512 in JSON Schema, and in the JSON of some languages."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(whole)]


def or_null(schema: dict[str, Any]) -> None:
    """For OpenAPI: this, or null."""
    of_the_field = {name: schema.pop(name) for name in ("default", "description", "title") if name in schema}
    this = dict(schema)
    schema.clear()
    schema.update({"anyOf": [this, {"type": "null"}]} | of_the_field)


class Parameters(BaseModel):
    """What one picture is asked to be. Strict: nothing is converted, and nothing unknown is ignored."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    prompt: str = Field(min_length=2, max_length=LONGEST_PROMPT, description="What to draw.")
    negative_prompt: str = Field("", max_length=LONGEST_PROMPT, description="What to avoid.", json_schema_extra=or_null)
    height: Whole = Field(1024, ge=LEAST_SIDE, le=MOST_SIDE, description="Pixels.")
    width: Whole = Field(1024, ge=LEAST_SIDE, le=MOST_SIDE, description="Pixels.")
    num_steps: Whole = Field(MOST_STEPS, ge=1, le=MOST_STEPS, description="The most steps to spend.")
    guidance: float = Field(
        DEFAULT_GUIDANCE, ge=0, le=30, allow_inf_nan=False, description="Higher follows the prompt more closely."
    )
    seed: Whole = Field(
        default_factory=lambda: secrets.randbits(32),
        ge=0,
        le=SEEDS - 1,
        description="The same seed gives the same picture; left out, a random one.",
        json_schema_extra=or_null,
    )
    decoder: Decoder = Field(
        "full",
        description="What makes pixels of latents: fast is quicker and a little less exact, where a model has it.",
        json_schema_extra=or_null,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name not in NULLABLE}


def counted_up(seed: int, number: int) -> int:
    """The seed of a request's picture ``number``, from 0: after the last there is comes the first."""
    return (seed + number) % SEEDS


def within_bounds(given: dict[str, Any]) -> Parameters:
    """Raises RequestError, which names the first parameter that is wrong."""
    try:
        return Parameters(**given)
    except ValidationError as error:
        name, message = explain(error)
        raise RequestError(message, name) from None


def explain(error: ValidationError) -> tuple[str, str]:
    """The first thing wrong: the parameter's dotted name, and a sentence for people."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    name = name if len(name) <= 100 else name[:100] + "..."
    if first["type"] == "extra_forbidden":
        return name, no_parameter(name)
    if first["type"] == "missing":
        return name, f"{name} is required."
    message = first["msg"].removeprefix("Value error, ")
    return name, f"{name}: {message}." if name else f"{message}."


def no_parameter(name: str) -> str:
    return f"There is no parameter {name!r}. It would be ignored, so it is refused."
