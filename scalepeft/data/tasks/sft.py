"""Plain instruct data by the keys of its rows (docs/data.md): conversations, texts, completions,
and alpaca rows with the prompt of https://github.com/tatsu-lab/stanford_alpaca.
"""

import json
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic.dataclasses import dataclass

from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT, Decides
from scalepeft.data.chat import SEAM, UNSAID, Messages
from scalepeft.data.rows import text_field
from scalepeft.data.tasks.base import Example, Score, Split, Task, TaskConfig

PROMPT = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{{instruction}}\n\n{}### Response:\n"
)
PLAIN = PROMPT.format("", "")
ABOUT = PROMPT.format(
    ", paired with an input that provides further context", "### Input:\n{input}\n\n"
)

Form = Literal["alpaca", "completion", "messages", "text"]
LISTS = ("messages", "conversations", "conversation")
ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
    "function": "tool", "observation": "tool", "developer": "system",
}  # fmt: skip
"""Of ShareGPT's ``from`` and of ``role`` -> the role in a chat template."""
SAYING = ("tool_calls", *UNSAID[-1])  # what a message without content has
THOUGHT = "</think>"
RESPONSES = ("output", "response", "completion")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SftConfig(TaskConfig):
    """Settings of instruct data.

    Attributes:
        format: ``alpaca``, ``completion``, ``messages`` (ShareGPT's too) or ``text``; null: told by
            each row's keys.
        prompt: of alpaca rows without an input.
        input_prompt: of those with one.
        train_on: as for every task; by default every answer of a conversation is learned.
    """

    name: Annotated[str, Decides.ROWS] = "sft"
    format: Annotated[Form | None, Decides.ROWS] = None
    prompt: Annotated[str, Decides.ROWS] = PLAIN
    input_prompt: Annotated[str, Decides.ROWS] = ABOUT
    train_on: Annotated[Literal["response", "turns", "all"], Decides.ROWS, Decides.TOKENS] = "turns"


class Sft(Task):
    """Instruct data; right is the row's ``answer`` (else its response), but for spacing."""

    Config: ClassVar[type[TaskConfig]] = SftConfig
    config: SftConfig
    version = 1

    def example(self, row: Any, row_id: str, split: Split) -> Example:
        """By the row's form; a test row must ask something."""
        if not isinstance(row, dict):
            text_field(row, "messages")  # raises: a row of what it is
        form = self.config.format or _form(row)
        if form == "messages":
            key = next((k for k in LISTS if k in row), LISTS[0])
            return self._talk(_messages(row, key), row, row_id)
        if form == "text":
            if split == "test":
                raise UserError("has 'text' alone, which asks nothing and has no answer")
            return self._made(row_id, "", text_field(row, "text"), {})
        response = next((k for k in RESPONSES if k in row), RESPONSES[form == "completion"])
        if form == "completion" and isinstance(row.get("prompt"), list):
            return self._talk(_messages(row, "prompt") + _messages(row, response), row, row_id)
        chat = self.config.template == "chat"
        placeless = ("history",) if chat else ("history", "system")
        if lost := [key for key in placeless if row.get(key)]:
            fix = "write it as 'messages'"
            raise UserError(f"'{lost[0]}' has no place in a row of the form {form}; {fix}")
        asked, about = text_field(row, "prompt" if form == "completion" else "instruction"), ""
        if form == "alpaca":
            key = "input" if "input" in row else "context"  # Dolly's
            about = text_field(row, key, required=False).strip()
        told = text_field(row, response)
        if chat:
            turns = (("user", f"{asked}\n\n{about}" if about else asked), ("assistant", told))
            return self._talk([{"role": r, "content": text} for r, text in turns], row, row_id)
        meta = {"question": asked, "answer": self._answer(row, told)}
        if form == "completion":
            return self._made(row_id, asked, told, meta)
        template = self.template(split)
        if about and (split != "test" or self.config.test_prompt is None):
            template = self.config.input_prompt
        if about and "{input}" not in template:
            raise UserError("'input' is not empty, but data.test_prompt has no {input} to hold it")
        values = {"instruction": asked, "input": about}
        return self.filled(row_id, template, values, {"output": told}, **meta)

    def asked(self, text: str) -> str:
        """In the form of training rows. Raises UserError: neither ``format`` nor a row tells it."""
        form, said = self.config.format, [{"role": "user", "content": text}]
        if form in (None, "completion"):
            try:
                first = next(self.stream("train"))
            except UserError as error:
                raise UserError(f"{error}; data.format=alpaca, messages or text tells") from None
            bare = first.prompt.replace(SEAM, "") == first.meta.get("question", "")
            form = "messages" if first.joined else "completion" if bare else "alpaca"
        if form == "text":
            return self.renderer.plain(text)
        row: Any = {"instruction" if form == "alpaca" else "prompt": text, "output": "."}
        if form == "messages":
            row |= {"messages": [*said, {"role": "assistant", "content": "."}], "prompt": said}
        return self.example(row, "prompt", "test").prompt

    def _made(self, row_id: str, prompt: str, completion: str, meta: dict[str, Any]) -> Example:
        prompt, completion = self.renderer.plain(prompt), self.renderer.response(completion)
        return self.made(row_id, prompt, completion, meta)

    def _talk(self, messages: Messages, row: dict[str, Any], row_id: str) -> Example:
        """The example of a conversation: up to its last answer."""
        talks = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        answers = [i for i in talks if messages[i].get("weight") != 0]
        if not answers:
            why = " (all have weight 0)" if talks else ""
            raise UserError(f"the conversation has no answer of the assistant to learn{why}")
        if self.config.template == "plain":
            raise UserError("is a conversation, which data.template=plain cannot write; take chat")
        messages = messages[: answers[-1] + 1]
        if row.get("system") and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": text_field(row, "system")}, *messages]
        told = str(messages[-1].get("content") or "")
        asked = [str(m.get("content") or "") for m in messages[:-1] if m["role"] == "user"]
        meta = {"question": "\n\n".join(asked), "answer": self._answer(row, told)}
        turns, tools = self.config.train_on == "turns", row.get("tools")
        if isinstance(tools, str):  # sets of the hub have them as text
            try:
                tools = json.loads(tools)
            except ValueError:
                raise UserError(f"'tools' is no JSON: {tools[:60]}") from None
        return self.conversation(row_id, messages, turns, tools=tools, **meta)

    def _answer(self, row: dict[str, Any], told: str) -> str:
        found = row.get("answer")
        if isinstance(found, (int, float)):
            return str(found)
        if found:
            return text_field(row, "answer")
        return self.renderer.response(told).replace(SEAM, "")

    def score(self, prediction: str, example: Example) -> Score:
        """The whole prediction, but for spacing."""
        wanted = example.meta["answer"]
        if THOUGHT not in wanted:  # thoughts that a chat template asks for are no part of it
            prediction = prediction.rpartition(THOUGHT)[2]
        found = " ".join(prediction.split())
        return Score(found or None, found == " ".join(wanted.split()))


def _form(row: dict[str, Any]) -> Form:
    if any(key in row for key in LISTS):
        return "messages"
    if "prompt" in row and any(key in row for key in RESPONSES):
        return "completion"
    if "instruction" in row:
        return "alpaca"
    if "text" in row:
        return "text"
    raise UserError(
        f"the row has {', '.join(map(str, row)) or 'no keys'}; allowed: instruction with output,"
        " prompt with completion, messages, conversations, text"
        f" (data.format: {', '.join(get_args(Form))})"
    )


def _messages(row: dict[str, Any], key: str) -> Messages:
    """Messages as a chat template takes them; other keys of theirs stay."""
    listed = row.get(key)
    if isinstance(listed, str) and key in RESPONSES:  # an answer to a list of messages
        return [{"role": "assistant", "content": text_field(row, key)}]
    if not isinstance(listed, list) or not listed:
        raise UserError(f"'{key}' must be a list of messages, not {type(listed).__name__}")
    found = []
    for number, message in enumerate(listed, 1):
        where = f"message {number} of '{key}'"
        if not isinstance(message, dict):
            raise UserError(f"{where} must be an object, not {type(message).__name__}")
        said, role = ("value", "from") if "from" in message else ("content", "role")
        name = ROLES.get(str(message.get(role)).lower())
        if name is None:
            allowed = ", ".join(ROLES)
            raise UserError(f"{where}: '{role}' is {message.get(role)!r}; allowed: {allowed}")
        rest = {k: v for k, v in message.items() if k not in (role, said) and v is not None}
        if calls := rest.get("tool_calls"):
            rest["tool_calls"] = _calls(calls, where)
        if message.get("weight", 1) not in (0, 1, None):
            raise UserError(f"{where}: 'weight' is {message['weight']!r}; allowed: 0, 1")
        content = _content(message.get(said), where)
        if not content.strip() and not any(map(rest.get, SAYING)):
            raise UserError(f"{where} is empty")
        found.append({"role": name, "content": content, **rest})
    return found


def _calls(calls: Any, where: str) -> Any:
    """Tool calls with arguments as chat templates take them: OpenAI has them as text of JSON."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}: 'tool_calls' must be a list of objects")
    found = []
    for call in calls:
        known = call.get("function", call)
        if isinstance(known, dict) and isinstance(text := known.get("arguments"), str):
            try:
                known = {**known, "arguments": json.loads(text)}
            except ValueError:
                raise UserError(f"{where}: arguments of a call are no JSON: {text[:60]}") from None
        found.append({**call, "function": known} if "function" in call else known)
    return found


def _content(said: Any, where: str) -> str:
    if isinstance(said, list):
        if other := [p for p in said if not isinstance(p, dict) or p.get("type", "text") != "text"]:
            raise UserError(f"{where} has a part that is no text: {str(other[0])[:60]}")
        said = "".join(text_field(part, "text") for part in said)
    return text_field({where: said}, where, required=False) if said != "" else ""
