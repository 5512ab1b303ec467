"""A conversation to token ids, and a model's reply back to its parts.

A model folder may bring a jinja template; else DeepSeek's formats are built in (V3.2 publishes no
template). The one idea: only the format itself may write control tokens. Where a message spells
one, or a part of one at its edge, a character is swapped for a private stand-in before rendering,
and swapped back once the real control tokens are cut out. So `<｜Assistant｜>` in a user's text
stays text.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from duck.errors import ConfigError
from duck.model.tokenizer import Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
# config.json does not tell V3, R1 and V3.1 apart; V3.1's tokenizer is the first with this token.
SEARCH = "<｜search▁begin｜>"
ROLES = ("system", "developer", "user", "assistant", "tool")


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    model_type: str,
    *,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Ids of a conversation up to where the model's reply begins, with BOS if the format has it.

    Args:
        messages: in OpenAI's form: `role`, `content` (a text, or a list of text parts), and for
            the assistant `reasoning_content` and `tool_calls`.
        tokenizer: the model's; its chat template is used where there is one.
        model_type: from config.json; chooses the built-in format where there is no template.
        thinking: let a model that can answer with and without thinking think first.
        tools: in OpenAI's form: {"type": "function", "function": {"name", "parameters", ...}}.

    Raises:
        ConfigError: messages, tools or thinking that the format cannot express, or no format.
    """
    text, disguise = _render(messages, tokenizer, model_type, thinking, tools)
    ids: list[int] = []
    for number, piece in enumerate(disguise.split(text)):
        if number % 2:
            ids.append(tokenizer.control_tokens[piece])
        elif piece:
            ids += tokenizer.encode_text(piece)
    return ids


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    model_type: str,
    *,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The same as text, to be read by people. Never encode it: it shows forged control tokens too.

    Arguments and errors are those of `encode_chat`.
    """
    text, disguise = _render(messages, tokenizer, model_type, thinking, tools)
    return disguise.take_off(text)


def _render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    model_type: str,
    thinking: bool,
    tools: Sequence[Mapping[str, Any]] | None,
) -> tuple[str, _Disguise]:
    """The prompt, in which every control token that can be seen was written by the format."""
    checked, checked_tools = _checked_messages(messages), _checked_tools(tools)
    if END_THINK in tokenizer.control_tokens:
        checked = [_split_thought(message) for message in checked]
    template = tokenizer.chat_template
    v32 = template is None and model_type == "deepseek_v32"
    if v32:  # before the disguise: JSON's escapes can spell a control token, too
        checked = [_parse_arguments(message) for message in checked]

    try:
        disguise = _Disguise(tokenizer, [checked, checked_tools])
        checked, checked_tools = disguise.put_on(checked), disguise.put_on(checked_tools)
    except RecursionError as error:
        raise ConfigError("messages or tools are nested too deeply") from error
    if template is not None:
        text = _from_template(template, checked, tokenizer, thinking, checked_tools, disguise)
    elif v32:
        _need(tokenizer, BOS, EOS, USER, ASSISTANT, THINK, END_THINK)
        text = _v32(checked, thinking, checked_tools)
    elif model_type == "deepseek_v3":
        _need(tokenizer, BOS, EOS, USER, ASSISTANT, *([THINK] if thinking else []))
        if checked_tools:
            raise ConfigError("tools need the model's own chat template, and its folder has none")
        text = _v3(checked, thinking, v31=SEARCH in tokenizer.control_tokens)
    else:
        raise ConfigError(
            f"model_type {model_type!r} has no built-in chat format, and the model's folder has no "
            "chat template: prompt it without chat"
        )
    return text, disguise


def _need(tokenizer: Tokenizer, *tokens: str) -> None:
    missing = [token for token in tokens if token not in tokenizer.control_tokens]
    if missing:
        raise ConfigError(f"the tokenizer lacks {', '.join(missing)}, which its chat format needs")


# --- messages ---


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list | tuple) or not messages:
        raise ConfigError("messages: allowed is a list with at least one message")
    return [_checked(message, number) for number, message in enumerate(messages)]


def _checked(message: Any, number: int) -> dict[str, Any]:
    """A copy with known role and types; content parts are joined."""

    def refuse(found: str, allowed: str) -> NoReturn:
        raise ConfigError(f"message {number}: {found}; allowed: {allowed}")

    if not isinstance(message, Mapping):
        refuse(f"a {type(message).__name__}", "an object with role and content")
    checked = dict(message)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        refuse(f"role {role!r}", ", ".join(ROLES))
    if isinstance(content, list | tuple):
        content = "".join(_part_text(part, number) for part in content)
    if not isinstance(content, str) and not (content is None and role == "assistant"):
        refuse(f"content of type {type(content).__name__}", "a text")
    checked["content"] = content
    if not isinstance(message.get("reasoning_content"), str | None):
        refuse("reasoning_content that is no text", "a text")

    calls = checked.pop("tool_calls", None)  # templates ask whether the key is there
    if calls:
        if role != "assistant":
            refuse(f"tool_calls from {role}", "tool_calls from the assistant")
        if not isinstance(calls, list | tuple) or not all(map(_is_call, calls)):
            refuse("a malformed tool call", '{"function": {"name": text, "arguments": object}}')
        checked["tool_calls"] = [{"type": "function", **call} for call in calls]
    elif content is None:
        refuse("an assistant message without content", "content, tool_calls or both")
    return checked


def _part_text(part: Any, number: int) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        allowed = '{"type": "text", "text": ...}'
        raise ConfigError(f"message {number}: a content part without text; allowed: {allowed}")
    return text


def _is_call(call: Any) -> bool:
    """Whether it is a function call whose arguments are a JSON object or the text of one."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        return False
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return isinstance(function.get("name"), str) and _is_object(arguments)
    return isinstance(function.get("name"), str) and isinstance(arguments, Mapping)


def _parse_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The arguments of tool calls as objects, where they were the text of one."""
    calls = []
    for call in message.get("tool_calls", []):
        function = call["function"]
        if isinstance(function["arguments"], str):
            function = {**function, "arguments": json.loads(function["arguments"])}
        calls.append({**call, "function": function})
    return message | {"tool_calls": calls} if calls else message


def _checked_tools(tools: Any) -> list[dict[str, Any]]:
    if not isinstance(tools, list | tuple | None):
        raise ConfigError(f"tools: found a {type(tools).__name__}; allowed is a list of functions")
    for number, tool in enumerate(tools or []):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
            allowed = '{"type": "function", "function": {"name": text, "parameters": schema}}'
            raise ConfigError(f"tool {number}: allowed is {allowed}")
    return [dict(tool) for tool in tools or []]


def _split_thought(message: dict[str, Any]) -> dict[str, Any]:
    """Move an earlier answer's thought out of its content, where clients often leave it.

    Formats drop such thoughts by looking for `</think>`, which they no longer see once disguised.
    """
    content = message["content"]
    if message["role"] != "assistant" or END_THINK not in (content or ""):
        return message
    if message.get("reasoning_content") is not None:
        return message
    thought, _, answer = content.partition(END_THINK)
    return message | {"reasoning_content": thought.removeprefix(THINK), "content": answer}


# --- forged control tokens ---

# Words that templates look for; they must stay what they are, and can complete no control token.
_FORM = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "id", "type"}
_FORM |= {"function", "name", "arguments", "description", "parameters", "tools", *ROLES}


class _Marks:
    """The control tokens of one tokenizer, ready to be looked for."""

    def __init__(self, tokens: frozenset[str]) -> None:
        ordered = sorted(tokens, key=len, reverse=True)  # where several match, the longest wins
        self.splitter = re.compile(f"({'|'.join(map(re.escape, ordered)) or '(?!)'})")
        rests: dict[str, list[str]] = {}
        for token in ordered:
            rests.setdefault(token[0], []).append(re.escape(token[1:]))
        # The first character of each token, also where tokens overlap.
        firsts = (f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items())
        self.starts = re.compile("|".join(firsts) or "(?!)")
        self.longest = max(map(len, tokens), default=0)
        self.heads = {token[:size] for token in tokens for size in range(1, len(token))}
        self.tails = {token[size:] for token in tokens for size in range(1, len(token))}
        self.insides = "\0".join(token[1:] for token in ordered)


# Hundreds of tokens take milliseconds to prepare, which a server would spend on every request.
_marks = functools.lru_cache(maxsize=4)(_Marks)


class _Disguise:
    """Swaps characters of control tokens in messages for private stand-ins, and back.

    Safe with templates that place, cut or strip texts; one that rewrote their letters could undo
    it.
    """

    def __init__(self, tokenizer: Tokenizer, inputs: Any) -> None:
        self._marks = _marks(frozenset(tokenizer.control_tokens))
        try:
            used = set(json.dumps(inputs, ensure_ascii=False) + (tokenizer.chat_template or ""))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"messages and tools must be JSON: {error}") from error
        self._free = (mask for mask in map(chr, range(0x100000, 0x10FFFE)) if mask not in used)
        self._mask_of: dict[str, str] = {}
        self._hidden: dict[str, str] = {}  # schemas repeat their few words thousands of times

    def split(self, text: str) -> list[str]:
        """Plain text, control token, plain text, ...: the plain texts without disguise."""
        pieces = self._marks.splitter.split(text)
        pieces[::2] = map(self.take_off, pieces[::2])
        return pieces

    def put_on(self, value: Any) -> Any:
        """`value` with every text in it disguised, keys too."""
        if isinstance(value, str):
            if value not in self._hidden:
                self._hidden[value] = self._hide(value)
            return self._hidden[value]
        if isinstance(value, Mapping):
            return {self.put_on(key): self.put_on(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.put_on(item) for item in value]
        return value

    def take_off(self, text: str) -> str:
        return text.translate({ord(mask): char for char, mask in self._mask_of.items()})

    def _hide(self, text: str) -> str:
        marks = self._marks
        at = [match.start() for match in marks.starts.finditer(text)]
        # What the format or another message puts next to an edge must not complete a token there.
        sizes = range(1, min(marks.longest, len(text) + 1))
        at += [len(text) - size for size in sizes if text[-size:] in marks.heads]
        inside = 0 < len(text) < marks.longest and text in marks.insides
        if text not in _FORM and (inside or any(text[:size] in marks.tails for size in sizes)):
            at.append(0)
        hidden = list(text)
        for index in at:
            hidden[index] = self._mask(text[index])
        return "".join(hidden)

    def _mask(self, character: str) -> str:
        if character not in self._mask_of:
            mask = next(self._free, None)
            if mask is None:
                raise ConfigError("the messages use all of Unicode's private characters")
            self._mask_of[character] = mask
        return self._mask_of[character]


# --- formats ---


def _from_template(
    source: str,
    messages: list[dict[str, Any]],
    tokenizer: Tokenizer,
    thinking: bool,
    tools: list[dict[str, Any]],
    disguise: _Disguise,
) -> str:
    """Run the folder's template as transformers does: sandboxed, with its filters and globals."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # Templates pass over what they do not know: ask them for nothing that they never mention.
    if tools and "tools" not in source:
        raise ConfigError("this model's chat template takes no tools")
    if thinking and "think" not in source:
        raise ConfigError("this model's chat template knows no thinking")
    if "developer" not in source:
        messages = [
            message | {"role": "system"} if message["role"] == "developer" else message
            for message in messages
        ]

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, "indent": indent, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source).render(
            **tokenizer.special_tokens,
            messages=messages,
            tools=tools or None,
            add_generation_prompt=True,
            thinking=thinking,
            enable_thinking=thinking,  # the same under its other name
        )
    except Exception as error:  # the template is a program of the model's: anything may come out
        reason = disguise.take_off(str(error)).replace("\n", " ")
        raise ConfigError(f"the model's chat template refuses the messages: {reason}") from error


def _v3(messages: list[dict[str, Any]], thinking: bool, *, v31: bool) -> str:
    """DeepSeek V3, R1 (V3 that thinks) and V3.1. Earlier thoughts are dropped."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] in ("system", "developer"))
    turns = [message for message in messages if message["role"] not in ("system", "developer")]
    if any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns):
        raise ConfigError("tool calls need the model's own chat template; its folder has none")
    _reply_is_due(turns, "user")
    text = BOS + system
    opening = ASSISTANT + (END_THINK if v31 else "")
    before = ""
    for turn in turns:
        if turn["role"] == "user":
            text += USER + turn["content"]
        else:
            text += (opening if before == "user" else "") + turn["content"] + EOS
        before = turn["role"]
    if not thinking:
        return text + opening
    return text + ASSISTANT + THINK + ("" if v31 else "\n")


def _v32(messages: list[dict[str, Any]], thinking: bool, tools: list[dict[str, Any]]) -> str:
    """DeepSeek V3.2, which publishes its format as a program, not as a template."""
    if tools:  # they belong to the first message, which then is a system message
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": ""}, *messages]
        messages = [messages[0] | {"tools": tools}, *messages[1:]]
    _reply_is_due(messages, "user", "developer", "tool")
    asked = max(
        (at for at, m in enumerate(messages) if m["role"] in ("user", "developer")), default=-1
    )
    text = BOS
    results = due = 0  # of the last tool calls: all, and those still to come
    for at, message in enumerate(messages):
        role, content = message["role"], message["content"] or ""
        if (role == "tool") != (due > 0):
            raise ConfigError(f"message {at}: role {role!r}, but {due} tool results are due here")
        opening = THINK if thinking and at >= asked else END_THINK
        if role == "system":
            text += content + _v32_extras(message)
        elif role == "developer":
            task = f"{_v32_extras(message)}\n\n# The user's message is: {content}"
            text += USER + task + ASSISTANT + opening
        elif role == "user":
            text += USER + content + ASSISTANT + opening
        elif role == "assistant":
            if thinking and at > asked:  # between tool calls the thoughts of this turn stay
                text += (message.get("reasoning_content") or "") + END_THINK
            calls = message.get("tool_calls", [])
            text += content + _v32_calls(calls) + EOS
            results = due = len(calls)
        else:
            text += "\n\n<function_results>" if due == results else ""
            text += f"\n<result>{content}</result>"
            due -= 1
            text += "" if due else f"\n</function_results>\n\n{opening}"
    if due:
        raise ConfigError(f"messages: {due} of the last {results} tool results are missing")
    return text


def _reply_is_due(messages: list[dict[str, Any]], *roles: str) -> None:
    if not messages or messages[-1]["role"] not in roles:
        raise ConfigError(f"messages: the last one must be from: {', '.join(roles)}")


def _v32_extras(message: Mapping[str, Any]) -> str:
    """What a system or developer message says about tools and the form of the reply."""
    text = ""
    if message.get("tools"):
        schemas = "\n".join(_json(tool["function"]) for tool in message["tools"])
        text += "\n\n" + _V32_TOOLS.replace("SCHEMAS", schemas)
    if message.get("response_format"):
        text += "\n\n" + _V32_FORMAT + _json(message["response_format"])
    return text


def _v32_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    if not calls:
        return ""
    text = "\n\n<｜DSML｜function_calls>\n"
    for call in calls:
        text += f'<｜DSML｜invoke name="{call["function"]["name"]}">\n'
        text += "\n".join(
            f'<｜DSML｜parameter name="{key}" string="{_is_text(value)}">{_plain(value)}'
            "</｜DSML｜parameter>"
            for key, value in call["function"]["arguments"].items()
        )
        text += "\n</｜DSML｜invoke>\n"
    return text + "</｜DSML｜function_calls>"


def _is_text(value: Any) -> str:
    return "true" if isinstance(value, str) else "false"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# The words V3.2 was trained on: they must not change.
_V32_FORMAT = """## Response Format:

You MUST strictly adhere to the following schema to reply:
"""
_V32_TOOLS = """## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as \
part of your reply to the user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while \
lists and objects should use JSON format. The "string" attribute should be set to "true" for \
string type parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider \
outputting a thinking block. Here is an example:

<｜DSML｜function_calls>
...
</｜DSML｜function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
SCHEMAS
</functions>
"""


# --- replies ---


@dataclass(frozen=True)
class ToolCall:
    """A function the model asks for; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Reply:
    """A completion's parts. Calls that are malformed stay in `content` as they were written."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]


def in_thought(prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether the prompt ends inside a thought, so that the reply begins there."""
    begin, end, user = (tokenizer.control_tokens.get(mark) for mark in (THINK, END_THINK, USER))
    last = next((id_ for id_ in reversed(prompt) if id_ in (begin, end, user)), None)
    return last is not None and last == begin


def parse_reply(text: str, *, in_thought: bool) -> Reply:
    """Split a completion of V3, R1, V3.1 or V3.2; the format is told by its marks.

    Args:
        text: the completion with control tokens such as `</think>`, without EOS.
        in_thought: whether the prompt ended inside a thought; see the function of that name.
    """
    if not in_thought and text.startswith(THINK):
        text, in_thought = text.removeprefix(THINK), True
    reasoning = ""
    if in_thought:
        reasoning, _, text = text.partition(END_THINK)
    for begin, parse in ((_CALLS_BEGIN, _parse_calls), (_DSML_BEGIN, _parse_dsml)):
        content, found, block = text.partition(begin)
        calls = parse(block) if found else ()
        if calls:
            return Reply(reasoning, content, calls)
    return Reply(reasoning, text, ())


_CALLS_BEGIN, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL = re.compile(
    r"\s*<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>", re.DOTALL
)
# V3 and R1 write the type where V3.1 writes the name.
_V3_FUNCTION = re.compile(r"\s*([^\n]+)\n```json\n(.*)\n```\s*", re.DOTALL)


def _parse_calls(block: str) -> tuple[ToolCall, ...]:
    """The calls of V3, R1 and V3.1, from behind the opening token; none if malformed."""
    body, _, _ = block.partition(_CALLS_END)
    calls = []
    at = 0
    while match := _CALL.match(body, at):
        name, arguments = match[1], match[2]
        if inner := _V3_FUNCTION.fullmatch(arguments):
            name, arguments = inner[1], inner[2]
        if not _is_object(arguments):
            return ()
        calls.append(ToolCall(name.strip(), arguments))
        at = match.end()
    return () if body[at:].strip() else tuple(calls)


_DSML_BEGIN, _DSML_END = "\n\n<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
_INVOKE = re.compile(r'\s*<｜DSML｜invoke name="(.*?)">(.*?)</｜DSML｜invoke>', re.DOTALL)
_PARAMETER = re.compile(
    r'\s*<｜DSML｜parameter name="(.*?)" string="(true|false)">(.*?)</｜DSML｜parameter>', re.DOTALL
)


def _parse_dsml(block: str) -> tuple[ToolCall, ...]:
    """The calls of V3.2, from behind the opening mark; none if malformed."""
    body, _, _ = block.partition(_DSML_END)
    calls = []
    at = 0
    while invoke := _INVOKE.match(body, at):
        arguments: dict[str, Any] = {}
        inside = 0
        while parameter := _PARAMETER.match(invoke[2], inside):
            key, is_text, value = parameter.groups()
            try:
                arguments[key] = value if is_text == "true" else json.loads(value)
            except json.JSONDecodeError:
                return ()
            inside = parameter.end()
        if invoke[2][inside:].strip():
            return ()
        calls.append(ToolCall(invoke[1], _json(arguments)))
        at = invoke.end()
    return () if body[at:].strip() else tuple(calls)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False
