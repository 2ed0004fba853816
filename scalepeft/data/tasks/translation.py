"""Translation between any two languages, scored by sacreBLEU (Post 2018), of rows as in
docs/data.md. Papers: CoVoST-2 (arXiv 2007.10310), ALMA (arXiv 2309.11674).
"""

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT, Decides
from scalepeft.data import bitext, languages
from scalepeft.data.rows import text_field
from scalepeft.data.tasks.base import (
    Example,
    Metric,
    Protocol,
    Score,
    Scored,
    Split,
    Task,
    TaskConfig,
    protocols,
)

RESAMPLES = 1000
"""Of the bootstrap: on a core 4 s at 2,000 rows, 40 s and 2 GB at CoVoST-2's 13,500 of German."""

PROTOCOLS = protocols("translation")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TranslationConfig(TaskConfig):
    """Settings of translation.

    Attributes:
        source_language: code of the language translated from, as the rows have it: ``de``,
            ``deu_Latn``, ``zh-CN``.
        target_language: code of the language translated to.
        source_name: its name in the prompt; null: the English name of the code.
        target_name: the same of the target.
        train_rows: the first so many training rows; null: all.
        bleu_tokenizer: sacreBLEU's; null: by the target: zh, ja-mecab or ko-mecab (char where that
            is not installed), char for Thai, Lao, Khmer, Burmese and Tibetan, else 13a.
    """

    PROTOCOLS: ClassVar[dict[str, Protocol]] = PROTOCOLS

    name: Annotated[str, Decides.ROWS] = "translation"
    protocol: Annotated[str | None, Decides.SCORES] = "alma"
    prompt: Annotated[str, Decides.ROWS] = PROTOCOLS["alma"].data["prompt"]
    completion: Annotated[str, Decides.ROWS] = "{target}"
    source_language: Annotated[str, Decides.ROWS, Decides.SCORES] = ""
    target_language: Annotated[str, Decides.ROWS, Decides.SCORES] = ""
    source_name: Annotated[str | None, Decides.ROWS] = None
    target_name: Annotated[str | None, Decides.ROWS] = None
    train_rows: Annotated[Annotated[int, Field(ge=1)] | None, Decides.ROWS] = None
    bleu_tokenizer: Annotated[
        Literal["13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "flores200"] | None,
        Decides.SCORES,
    ] = None

    def __post_init__(self) -> None:
        for side in ("source", "target"):
            if not getattr(self, f"{side}_language"):
                raise UserError(f"{side}_language is not set, e.g. data.{side}_language=de")
            self.name_of(side)
        if (code := self.source_language) == self.target_language:
            raise UserError(f"source_language={code}: is the target language as well")

    def name_of(self, side: str) -> str:
        """A language's name in the prompt. Raises UserError: none is set, and none known."""
        code, name = getattr(self, f"{side}_language"), getattr(self, f"{side}_name")
        return languages.name_of(code, side) if name is None else name


class Translation(Task):
    """Pairs of sentences; one file or hub set is one source."""

    Config: ClassVar[type[TaskConfig]] = TranslationConfig
    config: TranslationConfig
    version = 2
    headline = "BLEU"
    translates = True
    asking: ClassVar[dict[str, str]] = {"source": "", "target": "."}

    def stream(self, split: Split) -> Iterator[Example]:
        """Reads a split; a test needs sacreBLEU, and says so before anything is generated."""
        if split == "test":
            scorers(tokenizer := self._tokenizer())
        most = self.config.train_rows if split == "train" else None
        yield from islice(super().stream(split), most)
        wanted = languages.tokenizer_of(self.config.target_language)
        if split == "test" and not self.config.bleu_tokenizer and tokenizer != wanted:
            self.notes.append(
                f"BLEU counts characters (tok:char): sacreBLEU's {wanted} is not installed (pip"
                f" install 'sacrebleu[{wanted[:2]}]'), and its scores are others"
            )

    def rows(self, source: str, split: Split) -> bitext.Numbered:
        """JSON, tsv, pairs of files, reference lines."""
        return bitext.read(source, split)

    def example(self, row: Any, row_id: str, split: Split) -> Example:
        """Fills the templates; a reference line has an empty prompt, which generates nothing."""
        if isinstance(row, bitext.ReferenceLine):
            source, target = "", text_field({"the line": row}, "the line")
        else:
            source, target = self._pair(row)
        if "\n" in target or "\r" in target:
            raise UserError("the translation holds a line break; one is read up to its first")
        sides = {f"{side}_language": self.config.name_of(side) for side in ("source", "target")}
        template = self.template(split) if source else ""
        asked, meta = sides | {"source": source}, {"question": source, "reference": target}
        return self.filled(row_id, template, asked, {"target": target}, **meta)

    def _pair(self, row: Any) -> tuple[str, str]:
        codes = (self.config.source_language, self.config.target_language)
        if not isinstance(row, dict) or not row:
            return text_field(row, "translation"), ""  # raises: a row of what it is
        nested = {key: value for key, value in row.items() if isinstance(value, dict)}
        pairs = [key for key in nested if re.match(r"\w+-\w", key)]
        # Of several pairs in a row, the one of this direction.
        for key in ("translation", "-".join(codes), "-".join(codes[::-1]), *pairs):
            if key in nested:
                return self._both(nested[key], f"'{key}'")
        for one, other in (("sentence", "translation"), ("source", "target"), codes):
            if one in row and other in row:
                return text_field(row, one), text_field(row, other)
        if flores := {k[9:]: v for k, v in row.items() if k.startswith("sentence_")}:
            return self._both(flores, "the row")
        raise UserError(
            f"the row has {', '.join(map(str, row))}; a pair is one of {{translation: {{de, en}}}},"
            " {de-en: {de, en}}, {sentence, translation}, {source, target}, {de, en},"
            " {sentence_deu_Latn, sentence_eng_Latn}"
        )

    def _both(self, texts_by_code: dict[str, Any], where: str) -> tuple[str, str]:
        keys = []
        for side in ("source", "target"):
            code = getattr(self.config, f"{side}_language")
            if (key := languages.matching(code, [*texts_by_code])) is None:
                raise UserError(
                    f"{where} has {', '.join(map(str, texts_by_code)) or 'nothing'}, not '{code}'"
                    f" (data.{side}_language)"
                )
            keys.append(key)
        return text_field(texts_by_code, keys[0]), text_field(texts_by_code, keys[1])

    def score(self, prediction: str, example: Example) -> Score:
        """Takes the first of the first three lines that is not empty, as ALMA does."""
        lines = (line.strip() for line in prediction.split("\n")[:3])
        return Score(next(filter(None, lines), None), None)

    def metrics(self, rows: list[Scored]) -> dict[str, Metric]:
        """BLEU, chrF2 and chrF++ over these rows as one text; an empty output counts as one."""
        outputs = [row.score.extracted or "" for row in rows]
        references = [row.example.meta["reference"] for row in rows]
        found = {}
        for name, scorer in scorers(self._tokenizer()).items():
            score = scorer.corpus_score(outputs, [references], n_bootstrap=RESAMPLES)
            signature = scorer.get_signature().format()
            stated = json.loads(score.format(width=6, signature=signature, is_json=True))
            mean = stated.get("confidence_mean", score.score)  # none where all resamples are 0
            half = stated.get("confidence_var", 0.0)
            interval = [max(0.0, mean - half), min(100.0, mean + half)]
            found[name] = Metric(score.score, interval, False, f"{score.name}|{signature}")
        return found

    def _tokenizer(self) -> str:
        """The one that is set, or that of the target; for one that needs more, ``char``."""
        if self.config.bleu_tokenizer:
            return self.config.bleu_tokenizer
        found = languages.tokenizer_of(self.config.target_language)
        if found.endswith("-mecab"):
            try:
                scorers(found)
            except UserError:
                return "char"
        return found


def scorers(tokenizer: str) -> dict[str, Any]:
    """sacreBLEU's metrics. Raises UserError: it, or the tokenizer's library, is not installed."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        what = "translations are scored by sacreBLEU, which is not installed"
        raise UserError(f"{what}: pip install 'scalepeft[eval]'") from None
    try:
        return {"BLEU": BLEU(tokenize=tokenizer), "chrF2": CHRF(), "chrF++": CHRF(word_order=2)}
    except (RuntimeError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"sacreBLEU's tokenizer {tokenizer} cannot be used: {reason}") from None
