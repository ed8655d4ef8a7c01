"""Strict data models: unknown keys are errors with a suggestion, and every error is one readable line."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from streammerge.errors import RecipeError
from streammerge.names import path_as_text, unsafe_name


class Hint(NamedTuple):
    """What to say of a key that there is not, the page that says more, and the field that it is by its other name."""

    text: str
    page: str = ""
    field: str = ""


class Strict(BaseModel):
    """Base of everything read from a recipe, a command line or one of our JSON files.

    Attributes:
        hints: what to say of some keys that there are not, in place of the one most like it.
    """

    hints: ClassVar[Mapping[str, Hint]] = {}

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _named_by_a_path(cls, value: Any) -> Any:
        """Whatever is named by a text may be named by a path."""
        return [path_as_text(item) for item in value] if isinstance(value, list) else path_as_text(value)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts True as 1; who writes `density: true` does not mean all of it."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and {int, float} & {annotation, *get_args(annotation)}:
            raise ValueError("must be a number")
        return value


def _safe(name: str) -> str:
    if reason := unsafe_name(name):
        raise ValueError(reason)
    return name


FileName = Annotated[str, AfterValidator(_safe)]  # relative to a folder, and inside of it

Model = TypeVar("Model", bound=BaseModel)

_MUST = "must be "

# What pydantic finds wrong -> what is said of it, with the bound in it.
_IN_WORDS = {
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "string_unicode": "must be a text in Unicode",
    "path_type": "must be a path",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "string_too_short": "must be a text that is not empty",
    "too_short": "must hold at least {min_length}",
}


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
        pages: list[str] = []
        problems: dict[tuple[str, str], list[str]] = {}  # a place and its value -> what each form of a union says
        known_as: set[str] = set()  # fields that are there by another name
        for item in error.errors(include_url=False):
            place, model_there = _place(model, item["loc"])
            if item["type"] == "extra_forbidden":
                key = str(item["loc"][-1])
                hint = model_there.hints.get(key) if issubclass(model_there, Strict) else None
                hint = hint or Hint(suggest(key, model_there.model_fields))
                pages += [hint.page] if hint.page else []
                known_as.add(place.removesuffix(key) + hint.field)
                problems[f"there is no {place!r}: {hint.text}", ""] = []
            elif item["type"] == "missing":
                problems[_missing(place), ""] = []
            else:
                told = problems.setdefault((place, reprlib.repr(item["input"])), [])
                told.append(_in_words(item))
        for field in known_as:
            problems.pop((_missing(field), ""), None)
        lines = [_line(place, value, [*dict.fromkeys(told)]) for (place, value), told in problems.items()]
        lines += [f"see {page}" for page in dict.fromkeys(pages)]
        raise RecipeError(f"{what}: {'; '.join(lines)}") from None


def _line(place: str, value: str, told: list[str]) -> str:
    if not told:
        return place
    words = _either(told)
    wanted = words.startswith("must ") and not words.startswith("must not ")
    return f"{place}: {words}, not {value}" if wanted else f"{place} {value}: {words}"


def _missing(place: str) -> str:
    return f"{place} is missing"


def build_from_options(model: type[Model], values: Mapping[str, Any]) -> Model:
    """Make settings from options of a command line, which have the names of the fields.

    Raises:
        RecipeError: all that is wrong, in one line, by the names that were typed.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [
            f"--{str(item['loc'][0]).replace('_', '-')} {str(item['input'])[:100]}: {_in_words(item)}"
            for item in error.errors(include_url=False)
        ]
        raise RecipeError("; ".join(lines)) from None


def _in_words(problem: ErrorDetails) -> str:
    """What is wrong with a value, without the library's words."""
    words = _IN_WORDS.get(problem["type"])
    return problem["msg"].removeprefix("Value error, ") if words is None else words.format(**problem.get("ctx", {}))


def _either(told: list[str]) -> str:
    """What each form of a union says, in one."""
    if all(text.startswith(_MUST) for text in told):
        return _MUST + " or ".join(text.removeprefix(_MUST) for text in told)
    return ", or: ".join(told)


def _place(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, type[BaseModel]]:
    """Where something is wrong, without the names pydantic gives the forms of a union; and the model it is in."""
    parts: list[str] = []
    field: Any = model  # the annotation of what the parts so far lead to
    for part in location:
        members = [field, *get_args(field)]
        inner = next((member for member in members if isinstance(member, type) and issubclass(member, BaseModel)), None)
        if isinstance(part, int):
            parts.append(str(part))
        elif inner is not None:
            model = inner
            parts.append(part)
            field = model.model_fields[part].annotation if part in model.model_fields else None
        elif any(get_origin(member) is dict for member in members):
            parts.append(part)
    return ".".join(parts), model
