"""Language codes: their English names for prompts, and sacreBLEU's tokenizer of each target."""

import json
from pathlib import Path

from scalepeft.core.errors import UserError

# ISO 639-1 code -> ISO 639-3 as FLORES-200 has it, English name.
TABLE = json.loads(Path(__file__).with_name("languages.json").read_text(encoding="utf-8"))
NAMES = {two: name for two, (_, name) in TABLE.items()}
SHORT = {three: two for two, (three, _) in TABLE.items()}
SHORT |= {"lav": "lv", "fas": "fa", "mon": "mn", "ara": "ar", "sqi": "sq"}  # of the whole language

TOKENIZERS = {
    "zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab",
    # Written without spaces, of which 13a would make one word a sentence.
    "th": "char", "lo": "char", "km": "char", "my": "char",
    # A script in the code (yue_Hant, bod_Tibt) tells without the language.
    "hans": "zh", "hant": "zh", "thai": "char", "laoo": "char", "khmr": "char", "mymr": "char",
    "tibt": "char",
}  # fmt: skip


def language(code: str) -> str:
    """The language of a code, in two letters if it has such: ``de`` of ``deu_Latn``, ``de-AT``."""
    first = code.replace("-", "_").split("_")[0].lower()
    return SHORT.get(first, first)


def name_of(code: str, side: str) -> str:
    """The English name. Raises UserError for a code without one in the table."""
    if (found := language(code)) not in NAMES:
        what = "no English name known for this code (de, deu_Latn, zh-CN, ...)"
        raise UserError(f"{side}_language={code}: {what}; set data.{side}_name=NAME")
    return NAMES[found]


def tokenizer_of(code: str) -> str:
    """sacreBLEU's tokenizer for a target language."""
    parts = [language(code), *code.lower().replace("-", "_").split("_")[1:]]
    return next((TOKENIZERS[part] for part in parts if part in TOKENIZERS), "13a")


def matching(code: str, keys: list[str]) -> str | None:
    """The key that stands for a code: the same, or the only one of the same language."""
    if code in keys:
        return code
    found = [key for key in keys if language(key) == language(code)]
    return found[0] if len(found) == 1 else None
