"""Language codes: their English names for prompts, and sacreBLEU's tokeniser of each target."""

from collections.abc import Iterable

from scalepeft.core.errors import UserError

# ISO 639-1, ISO 639-3 as FLORES-200 has it, English name.
TABLE = """
af afr Afrikaans; am amh Amharic; ar arb Arabic; as asm Assamese; az azj Azerbaijani;
be bel Belarusian; bg bul Bulgarian; bn ben Bengali; bs bos Bosnian; ca cat Catalan; cs ces Czech;
cy cym Welsh; da dan Danish; de deu German; el ell Greek; en eng English; eo epo Esperanto;
es spa Spanish; et est Estonian; eu eus Basque; fa pes Persian; fi fin Finnish; fr fra French;
ga gle Irish; gl glg Galician; gu guj Gujarati; ha hau Hausa; he heb Hebrew; hi hin Hindi;
hr hrv Croatian; hu hun Hungarian; hy hye Armenian; id ind Indonesian; ig ibo Igbo;
is isl Icelandic; it ita Italian; ja jpn Japanese; jv jav Javanese; ka kat Georgian; kk kaz Kazakh;
km khm Khmer; kn kan Kannada; ko kor Korean; ky kir Kyrgyz; lb ltz Luxembourgish; lo lao Lao;
lt lit Lithuanian; lv lvs Latvian; mg plt Malagasy; mk mkd Macedonian; ml mal Malayalam;
mn khk Mongolian; mr mar Marathi; ms zsm Malay; mt mlt Maltese; my mya Burmese;
nb nob Norwegian Bokmål; ne npi Nepali; nl nld Dutch; pa pan Punjabi; pl pol Polish; ps pbt Pashto;
pt por Portuguese; ro ron Romanian; ru rus Russian; sd snd Sindhi; si sin Sinhala; sk slk Slovak;
sl slv Slovenian; so som Somali; sq als Albanian; sr srp Serbian; su sun Sundanese; sv swe Swedish;
sw swh Swahili; ta tam Tamil; te tel Telugu; tg tgk Tajik; th tha Thai; tl tgl Tagalog;
tr tur Turkish; uk ukr Ukrainian; ur urd Urdu; uz uzn Uzbek; vi vie Vietnamese; xh xho Xhosa;
yo yor Yoruba; zh zho Chinese; zu zul Zulu
"""
NAMES: dict[str, str] = {}
SHORT: dict[str, str] = {}
for _entry in TABLE.replace("\n", " ").split(";"):
    _two, _three, _name = _entry.split(maxsplit=2)
    NAMES[_two] = _name.strip()
    SHORT[_three] = _two
SHORT |= {"lav": "lv", "fas": "fa", "mon": "mn", "ara": "ar", "sqi": "sq"}  # of the whole language

TOKENIZERS = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}


def language(code: str) -> str:
    """The language of a code without script or region, in two letters where it has two: ``de`` of
    ``deu_Latn``, ``zh`` of ``zh-CN``; an unknown one as it is.
    """
    first = code.replace("-", "_").split("_")[0].lower()
    return SHORT.get(first, first)


def name_of(code: str, key: str) -> str:
    """The English name. Raises UserError for a code without one in the table."""
    if (found := language(code)) not in NAMES:
        raise UserError(
            f"{code}: no English name known for this code (de, deu_Latn, zh-CN, ...); set"
            f" data.{key}=NAME"
        )
    return NAMES[found]


def tokenizer_of(code: str) -> str:
    """sacreBLEU's tokeniser for a target language."""
    return TOKENIZERS.get(language(code), "13a")


def matching(code: str, keys: Iterable[str]) -> str | None:
    """The key that stands for a code: the same, or the only one of the same language."""
    listed = list(keys)
    if code in listed:
        return code
    found = [key for key in listed if language(key) == language(code)]
    return found[0] if len(found) == 1 else None
