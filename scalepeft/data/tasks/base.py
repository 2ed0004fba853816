"""The task protocol: rows of a file -> prompt and completion -> an answer found and scored."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT, Decides, NameList, deciding
from scalepeft.core.files import seal
from scalepeft.core.stats import wilson
from scalepeft.data.chat import SEAM, Messages, Renderer
from scalepeft.data.rows import expand, fill, one_line, read_rows, source_labels

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@plain_dataclass(frozen=True)
class Protocol:
    """Settings of published numbers: defaults of a config, and what it then deviates from."""

    about: str  # where it comes from, and its oddities, in a line or two
    data: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)


def protocols(task: str) -> dict[str, Protocol]:
    """The published settings of a task: name -> those of ``scalepeft/data/protocols/TASK.yaml``."""
    file = Path(__file__).parents[1] / "protocols" / f"{task}.yaml"
    named = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {name: Protocol(**settings) for name, settings in named.items()}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TaskConfig:
    """What every task's config has (section ``data``).

    Attributes:
        name: the task, a file of ``scalepeft/tasks``.
        protocol: settings of published numbers, by name: it fills the keys that are not set.
        train: files (json, json lines, csv, tsv, parquet, arrow), patterns, folders of
            ``save_to_disk``, or ``hf://DATASET[@REVISION][:CONFIG[:SPLIT]]``.
        valid: the same for the validation loss; or take ``valid_size``.
        test: the same for ``scalepeft evaluate``.
        valid_size: rows taken out of ``train`` for the validation loss, chosen by ``train.seed``.
        prompt: what the model is given; ``{instruction}`` and ``{input}`` are filled in.
        test_prompt: what it is given in an evaluation; null: the same.
        completion: what it is to write; ``{output}`` is filled in. An end-of-text token follows.
        template: ``plain`` takes prompt and completion as they are; ``chat`` as a user's and an
            assistant's turn, through the chat template; null: chat for rows that are conversations.
        chat_template: a file with one, or its text; null: the tokenizer's.
        system: a system message before conversations that have none; null: none.
        special_tokens: what spells a control token in a row (``</s>``) is plain text (``text``), or
            the token (``parse``): for rows that were rendered through a chat template before.
        train_on: ``response`` puts the loss on the completion alone, ``turns`` on all answers of a
            conversation, ``all`` on the prompt as well.
        tokenize: ``apart``: prompt and completion each by itself, so that training sees the very
            tokens generation starts from; ``together``: as one text, as most published scripts do
            and as conversations always are.
        duplicates: ``drop`` leaves out training rows whose prompt and completion came before.
        cutoff: length in tokens; the end is cut. Rows with no token to learn are dropped, counted.
        on_error: a broken row stops the run (``stop``) or is left out and counted (``skip``).
        workers: loader processes; 0 pads the batches in the training process.
        cache: folder of tokenized data; default ``$SCALEPEFT_CACHE`` or ``~/.cache/scalepeft``.
    """

    PROTOCOLS: ClassVar[dict[str, Protocol]] = {}
    OWN_VALID: ClassVar[bool] = False  # held-out rows need neither ``valid`` nor ``valid_size``

    name: Annotated[str, Decides.ROWS]
    protocol: Annotated[str | None, Decides.SCORES] = None
    train: Annotated[NameList, Decides.FILES] = Field(default_factory=list)
    valid: Annotated[NameList, Decides.FILES] = Field(default_factory=list)
    test: Annotated[NameList, Decides.FILES, Decides.PREDICTIONS] = Field(default_factory=list)
    valid_size: Annotated[int, Field(ge=0), Decides.ROWS] = 0
    prompt: Annotated[str, Decides.ROWS] = "{instruction}\n"
    test_prompt: Annotated[str | None, Decides.PREDICTIONS] = None
    completion: Annotated[str, Decides.ROWS] = "{output}"
    template: Annotated[Literal["plain", "chat"] | None, Decides.ROWS] = None
    chat_template: Annotated[str | None, Decides.ROWS] = None
    system: Annotated[str | None, Decides.ROWS] = None
    special_tokens: Annotated[Literal["text", "parse"], Decides.ROWS] = "text"
    train_on: Annotated[Literal["response", "turns", "all"], Decides.TOKENS] = "response"
    tokenize: Annotated[Literal["apart", "together"], Decides.TOKENS] = "apart"
    duplicates: Annotated[Literal["keep", "drop"], Decides.ROWS] = "keep"
    cutoff: Annotated[int, Field(ge=8), Decides.TOKENS, Decides.SPEED] = 512
    on_error: Annotated[Literal["stop", "skip"], Decides.LENGTH, Decides.SCORES] = "stop"
    workers: Annotated[int, Field(ge=0), Decides.RECORDS] = 0
    cache: Annotated[str | None, Decides.PLACE] = None


@plain_dataclass(frozen=True)
class Example:
    """One row, ready to train on or to generate from."""

    id: str  # stable: source and row number
    prompt: str
    completion: str
    meta: dict[str, Any] = field(default_factory=dict)
    learned: list[list[int]] = field(default_factory=list)
    """Parts of the prompt, [begin, end) in characters, that are learned as well."""
    joined: bool = False  # prompt and completion are one text, a conversation, and tokenized so


@plain_dataclass(frozen=True)
class Score:
    """What was found in a prediction, and how good it is."""

    extracted: str | None  # the answer, as text; None: nothing that looks like one
    correct: bool | None  # None where a single row has no right or wrong (translation)
    strict: bool | None = None
    """Whether the published protocol's script calls it right, where that is another than ours."""


@plain_dataclass(frozen=True)
class Metric:
    """A measured quantity over rows, as scores.json has it."""

    value: float
    ci95: list[float]
    share: bool = True  # in [0, 1]; else points as the library of the metric gives them
    signature: str = ""  # what exactly was computed, as published numbers state it (sacreBLEU's)


@plain_dataclass(frozen=True)
class Scored:
    """One row of an evaluation."""

    example: Example
    prediction: str
    score: Score


def share(hits: list[bool]) -> Metric:
    """The share of true values with its Wilson interval."""
    return Metric(sum(hits) / len(hits), [*wilson(sum(hits), len(hits))])


class Task:
    """A family of data sets with one row format, one prompt and one way to score."""

    Config: ClassVar[type[TaskConfig]] = TaskConfig
    version: ClassVar[int]  # of every reported number: raised when prompts or scoring change
    headline: ClassVar[str] = "accuracy"  # the metric that tables show first
    macro_average: ClassVar[bool] = False  # papers report the mean of the sources' headlines
    reads_files: ClassVar[bool] = True  # False: it makes its own rows
    translates: ClassVar[bool] = False  # ``question`` and ``reference`` of a row are COMET's
    asking: ClassVar[dict[str, str]] = {}  # a row that asks the text put in place of its ""

    def __init_subclass__(cls) -> None:
        if "examples" in vars(cls):  # it would be passed over where rows are streamed
            raise UserError(f"{cls.__name__}.examples: a task defines stream(split) in its place")

    def __init__(self, config: TaskConfig, tokenizer: Any = None) -> None:
        self.config = config
        self.poll: Callable[[], None] = lambda: None
        """Called for each row that is read; may raise to stop."""
        self.renderer = Renderer(tokenizer, config.chat_template, config.special_tokens == "parse")
        # Of the last ``examples``: broken rows left out, the number of duplicates, rows that spell
        # control tokens, test questions by their set, and what else is to be said, a line each.
        self.skipped: list[str] = []
        self.repeated = 0
        self.spelling: list[str] = []
        self.leaks = Counter[str]()
        self.notes: list[str] = []

    def examples(self, split: Split) -> list[Example]:
        """``stream``, as a list."""
        return list(self.stream(split))

    def reads(self, split: Split) -> tuple[Split, ...]:
        """The splits whose files decide the examples of this one."""
        return (split,) if self.reads_files else ()

    def stream(self, split: Split) -> Iterator[Example]:
        """Reads a split, row by row. Raises UserError: no files, unreadable ones, a broken row."""
        key = f"data.{split}"
        if not (sources := getattr(self.config, split)):
            raise UserError(f"{key} is empty: name files, e.g. {key}=DIR/{split}.json")
        files = expand(sources, key)
        self.skipped, self.repeated, self.spelling, self.notes = [], 0, [], []
        self.leaks = Counter()
        found, seen, ids = 0, set[int](), dict[int, int]()
        drop = self.config.duplicates == "drop"
        for label, source in zip(source_labels(files), files, strict=True):
            number = 0
            for number, row in self.rows(source, split):
                self.poll()
                row_id = f"{label}#{number}"
                try:
                    example = self._example(row, row_id, split)
                    own = example.id != row_id  # a prepared row's, which may come twice
                    if own and (before := ids.setdefault(_mark(example.id), number)) != number:
                        raise UserError(f"id {example.id} stood in row {before} already")
                except (UserError, RecursionError) as error:  # nested too deep to be shown
                    reason = one_line(str(error))
                    if self.config.name != "sft" and isinstance(row, dict) and "messages" in row:
                        reason += " (data=sft reads conversations)"
                    self._leave_out(f"{source}, row {number}: {reason}", "repair it")
                    continue
                if split == "train":
                    text = _mark(example.prompt, example.completion)
                    self.repeated += text in seen
                    if drop and text in seen:
                        continue
                    seen.add(text)
                found += 1
                yield example
            if not number:
                self._leave_out(f"{source}: no usable row, the file is empty", "copy it again")
        if not found:
            skipped = self.skipped
            why = f": {len(skipped)} left out, the first is {skipped[0]}" if skipped else ""
            raise UserError(f"{key}: no usable row in {', '.join(files)[:500]}{why}")

    def remarks(self, split: Split) -> list[str]:
        """What the user should know of the rows of the last ``examples``, a line each."""
        lines = [f"left out: {where}" for where in self.skipped[:3]]
        if len(self.skipped) > 3:
            lines.append(f"left out {len(self.skipped)} broken rows in all")
        if self.repeated and self.config.duplicates == "drop":
            lines.append(f"{self.repeated} rows left out as duplicates")
        if self.spelling:
            lines.append(
                f"{len(self.spelling)} rows spell control tokens, the first is {self.spelling[0]}:"
                " read as plain text (data.special_tokens=parse makes the tokens of them)"
            )
        return [f"data.{split}: {line}" for line in [*lines, *self.notes]]

    def _leave_out(self, what: str, remedy: str) -> None:
        if self.config.on_error == "stop":
            raise UserError(f"{what}; {remedy}, or data.on_error=skip leaves it out") from None
        self.skipped.append(what)

    def _example(self, row: Any, row_id: str, split: Split) -> Example:
        if isinstance(row, dict) and "prepared" in row and len(row.keys() & PREPARED) > 2:
            return from_prepared(row, prepared_for(self, split))
        return self.example(row, row_id, split)

    def filled(
        self, row_id: str, template: str, asked: dict[str, str], told: dict[str, str], **meta: Any
    ) -> Example:
        """A row's example: its prompt filled with ``asked``, its completion with ``told`` too."""
        write = fill
        if self.config.template != "chat":
            write = self.renderer.fill
            told = {key: self.renderer.response(text) for key, text in (asked | told).items()}
            asked = {key: self.renderer.plain(text) for key, text in asked.items()}
        prompt = write(template, asked, "data.prompt")
        completion = write(self.config.completion, {**asked, **told}, "data.completion")
        if self.config.template == "chat":
            turns = (("user", prompt), ("assistant", completion))
            said = [{"role": role, "content": text.strip()} for role, text in turns]
            return self.conversation(row_id, said, False, **meta)
        return self.made(row_id, prompt, completion, meta)

    def conversation(
        self, row_id: str, messages: Messages, turns: bool, tools: Any = None, **meta: Any
    ) -> Example:
        """The example of messages that end with an answer; ``turns``: learn earlier ones too."""
        if self.config.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.config.system}, *messages]
        if self.renderer.tokenizer is None:
            *before, last = (str(message.get("content") or "") for message in messages)
            return self.made(row_id, "\n\n".join(before), last, meta)
        prompt, completion, learned = self.renderer.split(messages, turns, tools)
        return self.made(row_id, prompt, completion, meta, learned=learned, joined=True)

    def made(
        self, row_id: str, prompt: str, completion: str, meta: dict[str, Any], **more: Any
    ) -> Example:
        """An example of these texts; ``meta`` gets its source."""
        if not more:
            completion = self.renderer.behind(prompt, completion)
        if SEAM in prompt or SEAM in completion:
            self.spelling.append(row_id)
        source = row_id.rsplit("#", 1)[0]
        return Example(row_id, prompt, completion, {"source": source, **meta}, **more)

    def rows(self, source: str, split: Split) -> Iterator[tuple[int, Any]]:
        """(row number from 1, row) of a source."""
        return read_rows(source)

    def template(self, split: Split) -> str:
        """The prompt's template of a split."""
        if split == "test" and self.config.test_prompt is not None:
            return self.config.test_prompt
        return self.config.prompt

    def asked(self, text: str) -> str:
        """The prompt of a test row that asks this; raises as ``example``."""
        return self.example({k: v or text for k, v in self.asking.items()}, "", "test").prompt

    def example(self, row: Any, row_id: str, split: Split) -> Example:
        """Builds one example from a row; raises UserError for a broken one.

        ``meta`` holds what ``score`` needs, ``source`` (rows of a source are scored together) and
        ``question`` (what is asked, without the prompt around it: equal ones are the same row).
        """
        raise NotImplementedError

    def score(self, prediction: str, example: Example) -> Score:
        """Finds the answer in generated text and compares it."""
        raise NotImplementedError

    def metrics(self, rows: list[Scored]) -> dict[str, Metric]:
        """Sums scored rows up; has ``headline``."""
        found = {"accuracy": share([bool(r.score.correct) for r in rows])}
        if any(r.score.strict is not None for r in rows):
            found["strict_accuracy"] = share([bool(r.score.strict) for r in rows])
        return found


# Of the fields that decide rows: the template stands for the prompt; the others choose rows alone.
SET_APART = {"prompt", "valid_size", "duplicates"}
PREPARED = {"prepared", "id", "prompt", "completion", "meta", "sum"}  # keys of a prepared row


def prepared_for(task: Task, split: Split) -> str:
    """What of task and config decides the examples of a row; prepared rows carry it."""
    config = task.config
    names = deciding(type(config), Decides.ROWS)
    values = {name: getattr(config, name) for name in names if name not in SET_APART}
    decides = [type(task).__name__, task.version, task.template(split), values]
    return hashlib.sha256(json.dumps(decides, default=str).encode()).hexdigest()[:16]


def to_prepared(example: Example, key: str) -> dict[str, Any]:
    """A row that ``Task.examples`` takes back as it is."""
    new = {"learned", "joined"}  # not in every row: rows of before have none
    values = {name: value for name, value in vars(example).items() if value or name not in new}
    return {"prepared": key, "sum": seal(values)[:16], **values}


def from_prepared(row: dict[str, Any], key: str) -> Example:
    """The example of a prepared row. Raises UserError: made under other settings, or changed."""
    values: dict[str, Any] = {k: row.get(k) for k in ("id", "prompt", "completion", "meta")}
    example = Example(**values, **{k: row[k] for k in ("learned", "joined") if k in row})
    if row != to_prepared(example, key):
        raise UserError(
            "a prepared row of another task, prompt or version, or changed after scalepeft pipeline"
            " wrote it: change the file it came from, and run scalepeft pipeline --from prepare"
        )
    return example


def _mark(*texts: str) -> int:
    """What tells texts apart in every process alike, in 8 bytes: hash() is another in each."""
    text = " ".join([*(str(len(text)) for text in texts), *texts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
