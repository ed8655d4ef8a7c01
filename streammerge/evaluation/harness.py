"""lm-evaluation-harness: the one module that knows its insides, as they are in version 0.4.13.

It generates, batches and calls the grading. What it does not tell is whether a response ended by itself; a subclass of
its model watches that. Importing this takes seconds, for it imports torch and transformers.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, NoReturn

import datasets
import lm_eval.api.task
import torch
import transformers
from lm_eval.api.model import CacheHook
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm import tqdm

from streammerge.errors import CheckpointError, StreammergeError
from streammerge.evaluation.grading import FINDERS, find_answer, grade
from streammerge.evaluation.task_files import FOLDER, TaskFile
from streammerge.fisher.measure import find_device
from streammerge.host import memory_errors
from streammerge.hub.xet import limit_xet_memory
from streammerge.progress import progress_bar, quiet_logger, quiet_transformers, tell

TESTED = "0.4.13"
LIBRARIES = ("lm_eval", "transformers", "torch")


@dataclass(frozen=True)
class Draw:
    """How responses are drawn.

    Attributes:
        samples: responses to each problem.
        temperature: 0 is greedy.
        seed: of sampling; None where nothing is drawn.
        max_new_tokens: most tokens of a response.
    """

    samples: int
    temperature: float
    seed: int | None
    max_new_tokens: int


@dataclass(frozen=True)
class Response:
    """One response.

    Attributes:
        text: up to and without the stop string, blanks around it removed.
        tokens: its length: what the model's own tokenizer makes of the text, special tokens that it adds included.
        ended: whether it ended by itself; else it was cut at the most tokens a response may have.
        answer: the answer found in it, None where there is none.
        right: whether that is right.
    """

    text: str
    tokens: int
    ended: bool
    answer: str | None
    right: bool


@dataclass(frozen=True)
class Solved:
    """A problem, the responses to it, and whether their vote is right; with one response, whether that is."""

    question: str
    gold: str
    responses: list[Response]
    right: bool


def libraries() -> dict[str, str]:
    """The versions of what generates."""
    return {name: version(name) for name in LIBRARIES}


class Harness:
    """A model in memory, and tasks that are run on it one by one.

    Args:
        path: folder, or repository id on the Hub.
        revision: commit on the Hub.
        device: as torch names it.
        batch_size: responses that are generated at a time.
        trust_remote_code: run Python code that the model brings.
        progress: show progress bars on a terminal.
        questions: the tasks, with their problems and how responses are drawn.

    Raises:
        RecipeError: there is no such device.
        CheckpointError: transformers cannot load it, its tokenizer names no end token, or it has too few positions.
    """

    def __init__(
        self,
        path: str,
        revision: str | None,
        *,
        device: str,
        batch_size: int,
        trust_remote_code: bool,
        progress: bool,
        questions: Mapping[TaskFile, tuple[Sequence[Mapping[str, str]], Draw]],
    ) -> None:
        limit_xet_memory()  # which the harness, imported, has lifted
        self._tasks = {}
        self._device = find_device(device)
        with _quiet(), _loading_errors(path), memory_errors(f"loading {path}", "take another --device"):
            config = transformers.AutoConfig.from_pretrained(
                path, revision=revision, trust_remote_code=trust_remote_code
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                path, revision=revision, trust_remote_code=trust_remote_code
            )
            if tokenizer.eos_token_id is None:
                raise CheckpointError(
                    f"model {path}: its tokenizer names no end token: set eos_token in tokenizer_config.json"
                )
            room = 0
            for task, (rows, draw) in questions.items():
                made = _make_task(task, rows, draw)
                prompts = [made.doc_to_text(row) for row in made.task_docs]
                room = max(room, max(len(ids) for ids in tokenizer(prompts)["input_ids"]) + draw.max_new_tokens)
                self._tasks[task.name] = made, draw
            _check_positions(path, config, room)
            self._model = _Model(
                pretrained=path,
                backend="causal",
                revision=revision or "main",
                tokenizer=tokenizer,
                device=str(self._device),
                batch_size=batch_size,
                trust_remote_code=trust_remote_code,
                max_length=room,
            )
        self._model.show = progress

    @property
    def device(self) -> str:
        return str(self._device)

    @property
    def dtype(self) -> str:
        return str(self._model.model.dtype).removeprefix("torch.")

    def run(self, name: str) -> list[Solved]:
        """Run one of the tasks; the problems in the order of its file."""
        task, draw = self._tasks[name]
        graded: dict[int, Any] = {}
        find = FINDERS.get(name, find_answer)

        def process_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
            graded[doc["id"]] = grade(results[0], doc["answer"], find)
            return {"accuracy": float(graded[doc["id"]][2])}

        task.set_config("process_results", process_results)
        self._model.label = name
        self._model.end_with(task.config.generation_kwargs["until"])
        gpus = [self._device] if self._device.type == "cuda" else []
        with _quiet(), torch.random.fork_rng(gpus):
            torch.manual_seed(draw.seed or 0)
            results = evaluate(self._model, {"tasks": {name: task}}, bootstrap_iters=0)
        ended = self._model.ended
        solved = []
        for sample in sorted(results["samples"][name], key=lambda sample: sample["doc_id"]):
            number, doc = sample["doc_id"], sample["doc"]
            answers, right, elected = graded[doc["id"]]
            texts = [text.strip() for text in sample["resps"][0]]
            lengths = [len(ids) for ids in self._model.tokenizer(texts)["input_ids"]]
            rows = zip(texts, lengths, ended[number], answers, right, strict=True)
            solved.append(Solved(doc["question"], doc["answer"], [Response(*row) for row in rows], elected))
        return solved


class _Whole:
    """Loads a causal language model, all of it: transformers would make up what is missing, and say so in a warning."""

    @staticmethod
    def from_pretrained(path: str, **options: Any) -> Any:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
        if missing := info["missing_keys"]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"model {path}: tensor {min(missing)!r} is missing{more}")
        return model


class _Model(HFLM):  # type: ignore[misc]  # untyped
    """The harness's model, which also tells what ended by itself, and draws as it is told to, whatever the model likes.

    The model's generation_config.json may ask for sampling, penalties and more, which would make another decoding of
    what is asked for; only its end tokens are kept.

    Attributes:
        show: show a progress bar.
        label: what it says.
        ended: by problem, for each of its responses whether it ended by itself.
    """

    AUTO_MODEL_CLASS = _Whole

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.show, self.label = False, ""
        self.ended: dict[int, list[bool]] = {}
        self._ends: deque[bool] = deque()
        given = self.model.generation_config.eos_token_id
        self._eos = {self.tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])} - {None}

    def end_with(self, until: Sequence[str]) -> None:
        """Have the stop strings that are one token end a response, as the end token does.

        The harness waits for all responses of a batch to have one and decodes without special tokens, so that what
        comes after such a stop string would be taken for a part of the response.
        """
        ids = self.tokenizer.convert_tokens_to_ids([*until])
        known = {id for id in ids if id is not None and id != self.tokenizer.unk_token_id}
        self.model.generation_config = transformers.GenerationConfig(eos_token_id=sorted(self._eos | known))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        del disable_tqdm
        with progress_bar(len(requests), self.label, "response", self.show) as bar:
            watch = _Watch(self._ends, bar)
            self.set_cache_hook(watch)
            texts: list[str] = super().generate_until(requests, disable_tqdm=True)
        self.ended = defaultdict(list)
        for request, text in zip(requests, texts, strict=True):
            same, ended = watch.seen[request.args[0]].popleft()
            assert same == text, "responses to one prompt come in the order in which they were asked for"
            self.ended[request.doc_id].append(ended)
        return texts

    def _model_generate(self, context: Any, max_length: int, stop: Sequence[str], **options: Any) -> Any:
        output = super()._model_generate(context, max_length, stop, **options)
        ends = set(self.model.generation_config.eos_token_id)
        for ids in output[:, context.shape[1] :].tolist():
            text = self.tokenizer.decode(ids)
            self._ends.append(not ends.isdisjoint(ids) or any(word in text for word in stop))
        return output


class _Watch(CacheHook):  # type: ignore[misc]  # untyped
    """Told of every response as it comes, in the order of generation, which is another than that of the requests."""

    def __init__(self, ends: deque[bool], bar: tqdm[NoReturn]) -> None:
        super().__init__(None)
        self._ends, self._bar = ends, bar
        self.seen: dict[str, deque[tuple[str, bool]]] = defaultdict(deque)

    def add_partial(self, attr: str, req: Any, res: str) -> None:
        del attr
        self.seen[req[0]].append((res, self._ends.popleft()))
        self._bar.update()


def _make_task(task: TaskFile, rows: Sequence[Mapping[str, str]], draw: Draw) -> Any:
    """The task of a file, with our rows in the place of its data set."""
    kept = {"id": list(range(len(rows)))} | {key: [row[key] for row in rows] for key in ("question", "answer")}
    sampling = {"do_sample": True, "temperature": draw.temperature, "top_p": 1.0, "top_k": 0}
    drawn = {"until": [*task.until], "max_gen_toks": draw.max_new_tokens}
    ours = {
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_dict(kept)},
        "process_docs": None,
        "doc_to_text": task.prompt,
        "repeats": draw.samples,
        "generation_kwargs": {**drawn, **(sampling if draw.temperature else {"do_sample": False})},
        "filter_list": [{"name": "all", "filter": [{"function": "take_first_k", "k": draw.samples}]}],
    }
    return lm_eval.api.task.ConfigurableTask(config={**load_yaml(FOLDER / f"{task.name}.yaml"), **ours})


def _check_positions(path: str, config: Any, room: int) -> None:
    """Say where responses may be longer than the config allows, and refuse it where the model would fail."""
    config = getattr(config, "text_config", None) or config
    most = getattr(config, "max_position_embeddings", None)
    if most is None or room <= most:
        return
    told = f"model {path}: made for {most} tokens (max_position_embeddings), prompt and response may take {room}"
    if not getattr(config, "rope_parameters", None):
        raise CheckpointError(f"{told}: give a smaller --max-new-tokens")
    tell(f"{told}: beyond that its rotary positions are extrapolated")


@contextmanager
def _loading_errors(path: str) -> Iterator[None]:
    """What transformers and tokenizers say of files that they cannot load, in one line."""
    try:
        yield
    except StreammergeError:
        raise
    except Exception as error:  # what is wrong with a model may break transformers anywhere
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"model {path}: transformers {transformers.__version__} cannot load it as a causal language model: {reason}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the libraries print off the terminal, for a while.

    The harness's warnings are about data sets given as ours are and models given as objects; its bar over the making
    of prompts would show where no bar is asked for. transformers' are about the generation config we replace.
    """
    bar = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = partial(bar, disable=True)
    try:
        with quiet_logger("lm_eval"), quiet_transformers():
            yield
    finally:
        lm_eval.api.task.tqdm = bar
