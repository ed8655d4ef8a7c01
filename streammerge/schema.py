"""Strict data models: unknown keys are errors with a suggestion, and every error is one readable line."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from streammerge.errors import RecipeError
from streammerge.names import unsafe_name


class Strict(BaseModel):
    """Base of everything read from a recipe, a command line or one of our JSON files."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _safe(name: str) -> str:
    if reason := unsafe_name(name):
        raise ValueError(reason)
    return name


FileName = Annotated[str, AfterValidator(_safe)]  # relative to a folder, and inside of it

Model = TypeVar("Model", bound=BaseModel)


def suggest(word: str, known: Iterable[str]) -> str:
    """A "did you mean" for a misspelt word, else the list of what there is."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"


def build(model: type[Model], values: Mapping[str, Any], what: str) -> Model:
    """Make a model from plain values.

    Args:
        model: the class.
        values: its fields.
        what: how to name it in messages: "the recipe", "method ties".

    Raises:
        RecipeError: all that is wrong, in one line.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            place = ".".join(str(part) for part in item["loc"] if not str(part).startswith("function"))
            if item["type"] == "extra_forbidden":
                fields = _fields_at(model, item["loc"])
                problems.append(f"there is no {place!r}: {suggest(str(item['loc'][-1]), fields)}")
            elif item["type"] == "missing":
                problems.append(f"{place} is missing")
            else:
                message = item["msg"].removeprefix("Value error, ")
                problems.append(f"{place}: {message}, not {reprlib.repr(item['input'])}")
        raise RecipeError(f"{what}: {'; '.join(dict.fromkeys(problems))}") from None


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The field names where an unknown key was found, following nested models."""
    for part in location[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            nested = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)]
            model = next((a for a in nested if issubclass(a, BaseModel)), model)
    return list(model.model_fields)
