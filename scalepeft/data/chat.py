"""What a tokenizer is to see: conversations as text, and no control token that a row spells."""

import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError
from scalepeft.data.rows import fill

SEAM = "\ufdd1"
"""A noncharacter put inside what would be a control token; ``tokens.encode`` takes it out again."""

UNSAID = ({"tools"}, {"tool_calls"}, {"reasoning_content", "thinking", "reasoning"})
"""Keys of conversations that say something (of a set, transformers takes one for the other): a
template must not pass over them in silence."""

TODAY = re.compile(r"""strftime_now\((["'])(.*?)\1\)""")
DATE = datetime(2024, 7, 26)
"""Today in chat templates (LLaMA 3's own default), lest rows depend on the day of a start."""

Messages = list[dict[str, Any]]


class Renderer:
    """Texts of one tokenizer; without one, for people and scores alone, they stay as they are.
    ``template``: a chat template, or a file that holds one; None: the tokenizer's own. ``parse``:
    what spells a control token in a row is one (rows that were rendered before).
    """

    def __init__(self, tokenizer: Any, template: str | None = None, parse: bool = False) -> None:
        self.tokenizer = tokenizer
        self.given = None if template is None or tokenizer is None else _template(template)
        self.chat_template = self.given
        with suppress(AttributeError, ValueError):  # it has none, or several without a default
            self.chat_template = tokenizer.get_chat_template(self.given)
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        marks = {str(t) for t in added if t.special}
        marks |= {*getattr(tokenizer, "all_special_tokens", ())}
        listed = sorted((re.escape(mark) for mark in marks if len(mark) > 1), key=len, reverse=True)
        self.marks = re.compile("(?!)" if parse or not listed else "|".join(listed))

    def plain(self, text: str) -> str:
        """The text with a seam in all that would be a control token."""
        while self.marks.search(text):  # again for a mark that stood within another
            text = self.marks.sub(lambda mark: mark[0][:-1] + SEAM + mark[0][-1], text)
        return text

    def fill(self, template: str, values: dict[str, str], key: str) -> str:
        """``fill``, so that no value becomes a control token with what stands beside it."""
        text, frame = fill(template, values, key), fill(template, dict.fromkeys(values, SEAM), key)
        if self._count(text) == self._count(frame):
            return text
        return fill(template, {name: f"{SEAM}{v}{SEAM}" for name, v in values.items()}, key)

    def behind(self, prompt: str, completion: str) -> str:
        """The completion, so that it makes no control token with the prompt's end."""
        apart = self._count(prompt) + self._count(completion)
        return completion if self._count(prompt + completion) == apart else SEAM + completion

    def _count(self, text: str) -> int:
        return len(self.marks.findall(text))

    def response(self, text: str) -> str:
        """``plain`` of what is to be written: an end-of-text at its end is what every row gets."""
        end, cut = getattr(self.tokenizer, "eos_token", None), text.rstrip()
        return self.plain(cut.removesuffix(end).rstrip() if end and cut.endswith(end) else text)

    def shut(self, value: Any) -> Any:
        """A message, or tools, with ``plain`` of all texts in it."""
        if isinstance(value, dict):
            kept = {self.shut(k): v if k == "role" else self.shut(v) for k, v in value.items()}
            if value.get("role") == "assistant" and (said := value.get("content")):
                kept["content"] = self.response(said)
            return kept
        if isinstance(value, list):
            return [self.shut(v) for v in value]
        return self.plain(value) if isinstance(value, str) else value

    def render(self, messages: Messages, ask: bool, **more: Any) -> str:
        """The conversation as text, with ``ask`` up to an answer. Raises UserError: refused."""
        if not messages:
            raise UserError(
                "the conversation begins with an answer, which nothing asks for: take it out, or"
                " set data.system (data.train_on=response does not learn it)"
            )
        if self.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template; name one (data.chat_template=FILE.jinja), or"
                " take data.template=plain for rows that are no conversations"
            )
        template = self.tokenizer.get_chat_template(self.given, more.get("tools"))
        said = {key for part in (more, *messages) for key, value in part.items() if value}
        for keys in UNSAID:
            if said & keys and not any(key in template for key in keys):
                lost = " or ".join(sorted(said & keys))
                fix = "take it out, or name another data.chat_template"
                raise UserError(f"the chat template does not write the row's {lost}: {fix}")
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask, **more,
                chat_template=TODAY.sub(lambda call: repr(DATE.strftime(call[2])), template),
            )  # fmt: skip
        except Exception as error:  # whatever a template calls
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"the chat template refuses the row: {reason[:300]}") from None

    def split(
        self, messages: Messages, turns: bool, tools: Any = None
    ) -> tuple[str, str, list[list[int]]]:
        """(prompt, completion, learned parts of the prompt as [begin, end)) of a conversation that
        ends with an answer; ``turns``: earlier ones are learned too. Raises UserError: it does not
        tell the turns.
        """
        messages, more = self.shut(messages), {"tools": self.shut(tools)} if tools else {}
        whole = self.render(messages, False, **more).rstrip()
        prompt = self._asked(messages, whole, **more)
        before = self.render(messages[:-1], False, **more).rstrip()
        if len(prompt) < len(_open(before, prompt, self.tokenizer)) or len(prompt) == len(whole):
            raise UserError(
                "the chat template writes the messages before an answer otherwise once it is given:"
                " where the answer begins cannot be told; name another data.chat_template"
            )
        parts = []
        for i, message in enumerate(messages[:-1]):
            if not turns or message["role"] != "assistant" or message.get("weight") == 0:
                continue
            end = self.render(messages[: i + 1], False, **more).rstrip()
            end = _open(end, whole, self.tokenizer)
            begin = self._asked(messages[: i + 1], end, **more)
            if not whole.startswith(end) or len(begin) >= len(end):
                raise UserError(
                    "the chat template writes earlier turns otherwise than the last: they cannot"
                    " be learned in one text; take data.train_on=response"
                )
            parts.append([len(begin), len(end)])
        return prompt, whole[len(prompt) :], parts

    def _asked(self, messages: Messages, text: str, **more: Any) -> str:
        """What of ``text``, these messages rendered, stands before the last of them, an answer."""
        asked = self.render(messages[:-1], True, **more)
        said = str(messages[-1].get("content") or "").strip()
        if "".join(said.split()) not in "".join(text.split()):  # templates are free with spaces
            raise UserError(
                "the chat template leaves out a part of an answer that is to be learned (its"
                " thoughts?): take it out of the row, or name another data.chat_template"
            )
        # Some templates begin an answer with what they leave out of one that is given ("<think>").
        pairs = enumerate(zip(asked, text, strict=False))
        found = asked[: next((i for i, (a, b) in pairs if a != b), min(len(asked), len(text)))]
        if found != asked and 0 <= (begin := text.rfind(said)) < len(found):
            return text[:begin]  # an answer that begins as that does ("<")
        return found


def _open(text: str, longer: str, tokenizer: Any) -> str:
    """A conversation's text, without an end-of-text that its template puts behind the last turn."""
    end = tokenizer.eos_token
    if longer.startswith(text) or not end or not text.endswith(end):
        return text
    return text.removesuffix(end).rstrip()


def _template(given: str) -> str:
    if "{" in given:
        return given
    try:
        if text := Path(given).read_text(encoding="utf-8"):
            return text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template={given}: cannot be read: {error}") from None
    raise UserError(f"data.chat_template={given}: is empty; copy it again")
