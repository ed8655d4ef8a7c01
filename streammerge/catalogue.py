"""The merge methods described, for a terminal and as docs/methods.md.

Everything comes from the methods themselves (docstring, schemas, passes), so that no page can say otherwise.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from streammerge.docstrings import Documentation, Passage, parse
from streammerge.errors import RecipeError
from streammerge.methods import METHODS
from streammerge.methods.aim import Aim
from streammerge.methods.api import TensorContext, Unit
from streammerge.recipe import DEFAULT_METHOD, make_recipe, resolve_method
from streammerge.schema import suggest

WIDTH = 80  # of prose in a terminal; formulas stay as they are

_LINK = r"arXiv (\d{4}\.\d{4,5}|[a-z-]+/\d{7})|doi (10\.\d{4,9}/\S*\w)|(https?://\S*[\w/])"
_URLS = ("https://arxiv.org/abs/", "https://doi.org/", "")
# What Markdown would take for markup where it stands.
_SPECIAL = r"\\|<(?=[A-Za-z/!?])|(?<!\s)\*|\*(?!\s)|(?<!\w)_|_(?!\w)|](?=[(\[])|&(?=#?\w+;)"
_MARKUP = re.compile(rf"(?P<code>`[^`]*`)|(?P<link>{_LINK})|{_SPECIAL}")


@dataclass(frozen=True)
class Parameter:
    """One parameter; `per_model`: every fine-tuned model may have its own value."""

    name: str
    default: Any
    per_model: bool
    description: str

    @property
    def shown(self) -> str:
        """The default as a recipe has it."""
        return self.default if isinstance(self.default, str) else json.dumps(self.default)


@dataclass(frozen=True)
class Cost:
    """What a merge of a matrix in a decoder block takes, all parameters at their defaults.

    Attributes:
        reads: how often a tensor larger than the buffer is read at most; any other is read once.
        survey: whether the models are read before the merge.
        fisher: of which models the diagonal Fisher is needed; empty: of none.
        calibration: what is measured on a calibration text.
    """

    reads: int
    survey: bool
    fisher: str
    calibration: tuple[str, ...]

    @property
    def before(self) -> tuple[str, ...]:
        """What runs before the merge."""
        found = (("calibration", self.calibration), ("Fisher pass", self.fisher), ("survey", self.survey))
        return tuple(name for name, runs in found if runs)

    def sentence(self) -> str:
        often = f"; a tensor larger than the buffer is read up to {self.reads} times" if self.reads > 1 else ""
        parts = [f"Reads each tensor once and writes it once{often}."]
        if self.survey:
            parts.append("A survey reads the models before the merge.")
        if self.fisher:
            parts.append(f"Needs the diagonal Fisher of {self.fisher}.")
        if self.calibration:
            parts.append(f"Needs a calibration text, to measure {' and '.join(self.calibration).replace('_', ' ')}.")
        return " ".join(parts)


@dataclass(frozen=True)
class Description:
    """All there is to say about a method. `fewest`, `most`: how many fine-tuned models it merges."""

    name: str
    summary: str
    reference: str
    url: str | None
    fewest: int
    most: int | None
    documentation: Documentation
    parameters: tuple[Parameter, ...]
    cost: Cost

    def plain(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def text(self) -> str:
        """For a terminal."""
        parts = [_wrapped(f"{self.name}: {self.summary}"), *_passages(self.documentation.text, _wrapped, _indented)]
        if self.parameters:
            heads = [f"  {p.name} = {p.shown}{' (for each model)' if p.per_model else ''}" for p in self.parameters]
            texts = [_wrapped(p.description, "      ") for p in self.parameters]
            parts.append("\n".join(["Parameters", *(line for pair in zip(heads, texts, strict=True) for line in pair)]))
        first, *others = self.documentation.convention
        parts += _passages((Passage(f"Convention: {first.text}", False), *others), _wrapped, _indented)
        if self.documentation.raises:
            errors = [_wrapped(f"{name}: {reason}", "  ") for name, reason in self.documentation.raises]
            parts.append("\n".join(["Raises", *errors]))
        known = self.url is None or self.url in self.documentation.reference
        parts += [
            _wrapped(f"Reference: {self.documentation.reference}") + ("" if known else f"\n{self.url}"),
            f"Fine-tuned models: {self.models}.",
            _wrapped(f"Cost: {self.cost.sentence()}"),
        ]
        return "\n\n".join(parts)

    def markdown(self) -> str:
        """Its section of docs/methods.md."""
        parts = [f"## {self.name}", f"{_sentence(_marked(self.summary))} Fine-tuned models: {self.models}."]
        parts += _passages(self.documentation.text, _marked, _fenced)
        if self.parameters:
            rows = [[f"`{p.name}`", f"`{p.shown}`", _scope(p), _marked(p.description)] for p in self.parameters]
            parts.append(_table(["parameter", "default", "for", "what it is"], rows))
        first, *others = _passages(self.documentation.convention, _marked, _fenced)
        parts += [f"**Convention:** {first}", *others]
        if self.documentation.raises:
            errors = [f"- `{name}`: {_marked(reason)}" for name, reason in self.documentation.raises]
            parts.append("\n".join(["**Raises:**", "", *errors]))
        parts += [f"**Reference:** {_marked(self.documentation.reference)}", f"**Cost:** {self.cost.sentence()}"]
        return "\n\n".join(parts)

    @property
    def models(self) -> str:
        """How many fine-tuned models it merges, in words."""
        words = {1: "one", 2: "two"}
        fewest, most = words.get(self.fewest, str(self.fewest)), words.get(self.most or 0, str(self.most))
        return f"{fewest} or more" if self.most is None else fewest if fewest == most else f"{fewest} or {most}"


def describe(name: str) -> Description:
    """One method, by its name as recipes have it; hyphens are accepted.

    Raises:
        RecipeError: there is no such method.
        ValueError: its docstring lacks something, a mistake of whoever wrote the method.
    """
    name = name.replace("-", "_")
    if name == "aim":
        raise RecipeError("aim is no method of its own but a post-step of any: --aim OMEGA, see docs/methods.md")
    if name not in METHODS:
        raise RecipeError(f"there is no method {name!r}: {suggest(name, METHODS)}")
    cls = METHODS[name]
    return Description(
        name=name,
        summary=cls.summary,
        reference=cls.reference,
        url=url_of(cls.reference),
        fewest=cls.fewest_experts,
        most=cls.most_experts,
        documentation=parse(cls),
        parameters=tuple(
            Parameter(key, field.get_default(call_default_factory=True), schema is cls.Expert, field.description or "")
            for schema in (cls.Parameters, cls.Expert)
            for key, field in schema.model_fields.items()
        ),
        cost=cost_of(name),
    )


def listing() -> list[dict[str, str]]:
    """Every method's name, summary and reference, in the order of METHODS."""
    return [{"name": n, "summary": cls.summary, "reference": cls.reference} for n, cls in METHODS.items()]


def listing_text() -> str:
    """The listing for a terminal."""
    rows = listing()
    names, summaries = (max(len(row[key]) for row in rows) for key in ("name", "summary"))
    return "\n".join(f"{r['name']:{names}}  {r['summary']:{summaries}}  {r['reference']}" for r in rows)


def markdown() -> str:
    """The page docs/methods.md, without its last line break."""
    methods = [describe(name) for name in METHODS]
    rows = [[f"[`{m.name}`](#{m.name})", _marked(m.summary), _marked(m.reference)] for m in methods]
    index = _table(["method", "what it does", "reference"], rows)
    return "\n\n".join([_INTRODUCTION, index, *(method.markdown() for method in methods), _post_step()])


def _post_step() -> str:
    """The section of AIM, which is no method of its own."""
    documentation = parse(Aim)
    convention, *others = _passages(documentation.convention, _marked, _fenced)
    parts = ["## AIM, after any method", "`--aim OMEGA`, or `aim: OMEGA` in a recipe, with a calibration text."]
    parts += _passages(documentation.text, _marked, _fenced)
    return "\n\n".join(
        [*parts, f"**Convention:** {convention}", *others, f"**Reference:** {_marked(documentation.reference)}"]
    )


def cost_of(name: str) -> Cost:
    """What the method does with a matrix of a decoder block, at its defaults and with the fewest models it merges."""
    matrix = TensorContext("model.layers.0.mlp.up_proj.weight", (18944, 3584), "BF16", 0)
    models = [f"model {i}" for i in range(METHODS[name].fewest_experts)]
    recipe = make_recipe({"base": "base", "models": models, "method": name})
    method = resolve_method(recipe, 7_000_000_000).method
    return Cost(
        reads=1
        + sum(step.reads_rows and not step.spare for step in method.passes(Unit(method.unit_of(matrix), (matrix,)))),
        survey=method.survey(matrix) is not None,
        fisher="" if not method.needs_fisher else "every model" if method.fisher_of_experts else "the base",
        calibration=method.calibration,
    )


def url_of(reference: str) -> str | None:
    """The address of the first arXiv id, doi or URL in a text."""
    match = re.search(_LINK, reference)
    if match is None:
        return None
    return next(start + found for start, found in zip(_URLS, match.groups(), strict=True) if found)


_INTRODUCTION = f"""\
# Merge methods

Written by `make docs` from the docstrings and schemas of `streammerge.METHODS`; `streammerge methods NAME` prints the
same for one method. The default method is `{DEFAULT_METHOD}`.

In the formulas theta_0 is the base model and theta_i fine-tuned model i, tensor by tensor; d_i = theta_i - theta_0 is
its task vector and c_i its `coefficient`. Every parameter is an option of `streammerge merge` and a key of a recipe's
`parameters`; one that is for each model may also stand beside a model there, or be a list with a value for each.

The cost is that of a matrix in a decoder block, the parameters at their defaults; the buffer is one worker's part of
`--max-ram`."""


# --- forms --------------------------------------------------------------------------------------------------------


def _passages(passages: Sequence[Passage], prose: Callable[[str], str], formula: Callable[[str], str]) -> list[str]:
    return [formula(passage.text) if passage.formula else prose(passage.text) for passage in passages]


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _indented(formula: str) -> str:
    return textwrap.indent(formula, "    ")


def _fenced(formula: str) -> str:
    return f"```text\n{formula}\n```"


def _marked(text: str) -> str:
    """Prose as Markdown: references linked, and nothing but `code` taken for markup."""
    return _MARKUP.sub(_as_markdown, text)


def _as_markdown(match: re.Match[str]) -> str:
    if match["code"]:
        return match["code"]
    address = url_of(match["link"] or "")
    if address is None:
        return f"\\{match[0]}"
    return f"<{address}>" if address == match["link"] else f"[{match['link']}]({address})"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _scope(parameter: Parameter) -> str:
    return "each model" if parameter.per_model else "the merge"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (header, *rows)]
    first, *others = (f"| {line} |" for line in lines)
    return "\n".join([first, f"|{'---|' * len(header)}", *others])
