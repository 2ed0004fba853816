"""What a tokenizer is to see of a row: conversations through a chat template, and no control token
that a row's text spells.
"""

import re
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError

SEAM = "\ufdd1"
"""A noncharacter of Unicode, put inside what a tokenizer would read as a control token.
``tokens.encode`` takes its tokens out again."""

Messages = list[dict[str, Any]]


class Renderer:
    """Texts of one tokenizer.

    Args:
        template: a chat template, or a file that holds one; None: the tokenizer's own.
        parse: what spells a control token in a row is one (rows that were rendered before).
    """

    def __init__(self, tokenizer: Any, template: str | None = None, parse: bool = False) -> None:
        self.tokenizer = tokenizer
        self.chat_template = _template(tokenizer, template)
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        marks = {str(t) for t in added if t.special} | set(tokenizer.all_special_tokens)
        listed = sorted((re.escape(mark) for mark in marks if len(mark) > 1), key=len, reverse=True)
        self.marks = re.compile("|".join(listed)) if listed and not parse else None

    def plain(self, text: str) -> str:
        """The text with a seam in all that would be a control token."""
        if self.marks is None:
            return text
        return self.marks.sub(lambda mark: mark[0][:-1] + SEAM + mark[0][-1], text)

    def response(self, text: str) -> str:
        """``plain`` of what is to be written: an end-of-text at its end is what every row gets."""
        end, cut = self.tokenizer.eos_token, text.rstrip()
        return self.plain(cut.removesuffix(end).rstrip() if end and cut.endswith(end) else text)

    def shut(self, value: Any) -> Any:
        """A message, or tools, with ``plain`` of all texts in it."""
        if isinstance(value, dict):
            kept = {key: v if key == "role" else self.shut(v) for key, v in value.items()}
            if value.get("role") == "assistant" and (said := value.get("content")):
                kept["content"] = self.response(said)
            return kept
        if isinstance(value, list):
            return [self.shut(v) for v in value]
        return self.plain(value) if isinstance(value, str) else value

    def render(self, messages: Messages, ask: bool, **more: Any) -> str:
        """The conversation as text; ``ask``: up to where the assistant is to write.

        Raises:
            UserError: there is no template, or it refuses these messages.
        """
        if self.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template; name one (data.chat_template=FILE.jinja), or"
                " take data.template=plain for rows that are no conversations"
            )
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, tokenize=False,
                add_generation_prompt=ask, **more,
            )  # fmt: skip
        except Exception as error:  # whatever a template calls
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"the chat template refuses the row: {reason[:300]}") from None
        return text

    def split(
        self, messages: Messages, turns: bool, tools: Any = None
    ) -> tuple[str, str, list[list[int]]]:
        """(prompt, completion, learned parts of the prompt as [begin, end)) of a conversation that
        ends with the assistant's turn. ``turns``: its earlier ones are learned too.

        Raises:
            UserError: as ``render``; or the template writes a conversation so that a turn cannot be
                found in it.
        """
        messages, more = self.shut(messages), {"tools": self.shut(tools)} if tools else {}
        whole = self.render(messages, False, **more).rstrip()
        before, asked = (self.render(messages[:-1], ask, **more) for ask in (False, True))
        # Some templates begin an answer with what they leave out of one that is given ("<think>").
        prompt = _common(asked, whole)
        if len(prompt) < len(before.rstrip()) or len(prompt) == len(whole):
            raise UserError(
                "the chat template writes the messages before an answer otherwise once it is given:"
                " where the answer begins cannot be told; name another data.chat_template"
            )
        parts = []
        for i in [i for i, m in enumerate(messages[:-1]) if turns and m["role"] == "assistant"]:
            begin = _common(self.render(messages[:i], True, **more), whole)
            end = self.render(messages[: i + 1], False, **more).rstrip()
            if not whole.startswith(end) or len(begin) >= len(end):
                raise UserError(
                    "the chat template writes earlier turns otherwise than the last: they cannot"
                    " be learned in one text; take data.train_on=response"
                )
            parts.append([len(begin), len(end)])
        return prompt, whole[len(prompt) :], parts


def _common(one: str, other: str) -> str:
    """The beginning that two texts share."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _template(tokenizer: Any, given: str | None) -> str | None:
    if given is None:
        try:
            found: str = tokenizer.get_chat_template()
        except (AttributeError, ValueError):  # it has none, or several without a default
            return None
        return found
    if "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template={given}: cannot be read: {error}") from None
