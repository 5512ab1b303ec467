"""Chat formats, forged control tokens and replies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import duck.model.chat
from duck.errors import ConfigError
from duck.model.chat import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    SEARCH,
    THINK,
    USER,
    Reply,
    ToolCall,
    encode_chat,
    in_thought,
    parse_reply,
    render,
)
from duck.model.tokenizer import Tokenizer

TOOL_MARKS = [
    f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
]
DSML = "｜DSML｜"
# The letters of real merges, so that the ids of V3.2's published example can be had.
PIECES = {
    "hello": 33310, "Hello": 19923, "!": 3, "ĠI": 342, "Ġam": 1030, "ĠDeep": 22651, "Se": 4374,
    "ek": 1465, ".": 16, "1": 19, "+": 13, "=?": 127252,
}  # fmt: skip
REAL_IDS = {BOS: 0, EOS: 1, USER: 128803, ASSISTANT: 128804, THINK: 128798, END_THINK: 128799}


def backend(extra: Iterable[str] = ()) -> tokenizers.Tokenizer:
    """A byte-level tokenizer with a few merges; control tokens have DeepSeek's ids."""
    vocab = dict(REAL_IDS) | PIECES
    merges = []
    for piece in PIECES:
        for size in range(2, len(piece) + 1):
            vocab.setdefault(piece[:size], 200_000 + len(vocab))
            merges.append((piece[: size - 1], piece[size - 1]))
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab.setdefault(letter, 200_000 + len(vocab))
    made = tokenizers.Tokenizer(models.BPE(vocab, list(dict.fromkeys(merges))))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(text, special=text in (BOS, EOS)) for text in [*REAL_IDS, *extra]])
    return made


def tokenizer(extra: Iterable[str] = (), template: str | None = None) -> Tokenizer:
    names = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True}
    return Tokenizer(backend(extra), names, template)


PLAIN = tokenizer()
V31 = tokenizer([SEARCH])
V32 = tokenizer([DSML, *TOOL_MARKS])


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "system", "content": text, **more}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "c1", "content": text}


# --- V3, R1, V3.1 ---

TALK = [
    system("Be brief."),
    user("1+1?"),
    assistant("<think>easy</think>2", reasoning_content=None),
    user("Sure?"),
]


def test_v3() -> None:
    wanted = f"{BOS}Be brief.{USER}1+1?{ASSISTANT}2{EOS}{USER}Sure?{ASSISTANT}"
    assert render(TALK, PLAIN, "deepseek_v3") == wanted


def test_r1_is_v3_that_thinks() -> None:
    wanted = f"{BOS}Be brief.{USER}1+1?{ASSISTANT}2{EOS}{USER}Sure?{ASSISTANT}{THINK}\n"
    assert render(TALK, PLAIN, "deepseek_v3", thinking=True) == wanted


@pytest.mark.parametrize(("thinking", "mark"), [(True, THINK), (False, END_THINK)])
def test_v31(thinking: bool, mark: str) -> None:
    wanted = f"{BOS}Be brief.{USER}1+1?{ASSISTANT}{END_THINK}2{EOS}{USER}Sure?{ASSISTANT}{mark}"
    assert render(TALK, V31, "deepseek_v3", thinking=thinking) == wanted


def test_system_messages_are_joined_and_content_parts_too() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [system("x"), {"role": "developer", "content": "y"}, user(parts)]
    assert render(messages, PLAIN, "deepseek_v3") == f"{BOS}x\n\ny{USER}ab{ASSISTANT}"


def test_turns_of_one_side_in_a_row() -> None:
    messages = [user("a"), user("b"), assistant("c"), assistant("d"), user("e")]
    wanted = f"{BOS}{USER}a{USER}b{ASSISTANT}{END_THINK}c{EOS}d{EOS}{USER}e{ASSISTANT}{END_THINK}"
    assert render(messages, V31, "deepseek_v3") == wanted


@pytest.mark.parametrize("made", [PLAIN, V31, V32], ids=["v3", "v3.1", "v3.2"])
def test_bos_comes_once(made: Tokenizer) -> None:
    model_type = "deepseek_v32" if made is V32 else "deepseek_v3"
    ids = encode_chat([user("hello")], made, model_type)
    assert ids[:3] == [0, 128803, 33310]
    assert ids.count(0) == 1


def test_v3_without_a_token_to_think_with_says_so() -> None:
    made = backend()
    bare = tokenizers.Tokenizer(made.model)
    bare.decoder = decoders.ByteLevel()
    bare.add_tokens([AddedToken(text) for text in (BOS, EOS, USER, ASSISTANT)])
    old = Tokenizer(bare, {})
    assert render([user("a")], old, "deepseek_v3") == f"{BOS}{USER}a{ASSISTANT}"
    with pytest.raises(ConfigError, match=f"lacks {THINK}"):
        encode_chat([user("a")], old, "deepseek_v3", thinking=True)
    with pytest.raises(ConfigError, match=f"lacks {THINK}, {END_THINK}"):
        encode_chat([user("a")], old, "deepseek_v32")


# --- V3.2 ---

EXAMPLE = [
    user("hello"),
    assistant("Hello! I am DeepSeek.", reasoning_content="thinking..."),
    user("1+1=?"),
]


def test_v32_gives_the_published_ids() -> None:
    """The example of DeepSeek-V3.2's model card, with its real token ids."""
    wanted = [0, 128803, 33310, 128804, 128799, 19923, 3, 342, 1030, 22651, 4374, 1465, 16, 1]
    wanted += [128803, 19, 13, 19, 127252, 128804, 128798]
    assert encode_chat(EXAMPLE, V32, "deepseek_v32", thinking=True) == wanted
    assert encode_chat(EXAMPLE, V32, "deepseek_v32")[-1] == 128799


DATE, WEATHER = '{"zone": "UTC"}', {"city": "Köln", "days": 2, "units": ["C"], "wind": None}
TOOLS = [
    {"type": "function", "function": {"name": "date", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "weather", "description": "Wie? <b>"}},
]
LOOP = [
    system("Help."),
    user("Weather?"),
    assistant(None, reasoning_content="first the date", tool_calls=[call("date", DATE)]),
    result("today"),
    assistant(
        "Wait.",
        reasoning_content="now both",
        tool_calls=[call("weather", WEATHER), call("weather", json.dumps(WEATHER))],
    ),
    result("sun"),
    result("rain"),
]
DATE_BLOCK = f"""

<{DSML}function_calls>
<{DSML}invoke name="date">
<{DSML}parameter name="zone" string="true">UTC</{DSML}parameter>
</{DSML}invoke>
</{DSML}function_calls>"""
WEATHER_INVOKE = f"""<{DSML}invoke name="weather">
<{DSML}parameter name="city" string="true">Köln</{DSML}parameter>
<{DSML}parameter name="days" string="false">2</{DSML}parameter>
<{DSML}parameter name="units" string="false">["C"]</{DSML}parameter>
<{DSML}parameter name="wind" string="false">null</{DSML}parameter>
</{DSML}invoke>"""
WEATHER_BLOCK = f"""

<{DSML}function_calls>
{WEATHER_INVOKE}
{WEATHER_INVOKE}
</{DSML}function_calls>"""
RESULTS = [
    "\n\n<function_results>\n<result>today</result>\n</function_results>\n\n",
    "\n\n<function_results>\n<result>sun</result>\n<result>rain</result>\n</function_results>\n\n",
]


def test_v32_keeps_the_thoughts_of_a_turn_that_calls_tools() -> None:
    wanted = (
        f"{BOS}Help.{USER}Weather?{ASSISTANT}{THINK}first the date{END_THINK}{DATE_BLOCK}{EOS}"
        f"{RESULTS[0]}{THINK}now both{END_THINK}Wait.{WEATHER_BLOCK}{EOS}{RESULTS[1]}{THINK}"
    )
    assert render(LOOP, V32, "deepseek_v32", thinking=True) == wanted


def test_v32_drops_them_once_the_user_speaks_again_or_nobody_thinks() -> None:
    messages = [*LOOP, assistant("Mixed.", reasoning_content="so"), user("Thanks")]
    body = (
        f"{BOS}Help.{USER}Weather?{ASSISTANT}{END_THINK}{DATE_BLOCK}{EOS}"
        f"{RESULTS[0]}{END_THINK}Wait.{WEATHER_BLOCK}{EOS}"
        f"{RESULTS[1]}{END_THINK}Mixed.{EOS}{USER}Thanks{ASSISTANT}"
    )
    assert render(messages, V32, "deepseek_v32", thinking=True) == body + THINK
    assert render(messages, V32, "deepseek_v32") == body + END_THINK


def test_v32_lists_tools_in_the_words_it_was_trained_on() -> None:
    schemas = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in TOOLS)
    text = render(LOOP, V32, "deepseek_v32", tools=TOOLS)
    head, tail = text.split(f"<functions>\n{schemas}\n</functions>\n")
    assert tail.startswith(f"{USER}Weather?")
    assert head.startswith(f"{BOS}Help.\n\n## Tools\n\nYou have access")
    # Of the same part of the expected output that DeepSeek published with the model.
    digest = hashlib.sha256(head.removeprefix(f"{BOS}Help.\n\n").encode()).hexdigest()
    assert digest == "3df0c26ebd288ba63f4073b738003112af08ad3b091c6bbb404e24565d797f8c"
    bare = render([user("Hi")], V32, "deepseek_v32", tools=TOOLS)
    assert bare.startswith(f"{BOS}\n\n## Tools\n")
    assert bare.endswith(f"</functions>\n{USER}Hi{ASSISTANT}{END_THINK}")


def test_v32_developer_and_response_format() -> None:
    form = {"type": "json_schema", "schema": {"a": "ß"}}
    said = (
        "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        + json.dumps(form, ensure_ascii=False)
    )
    messages = [{"role": "developer", "content": "Find it", "response_format": form}]
    assert render(messages, V32, "deepseek_v32", thinking=True) == (
        f"{BOS}{USER}{said}\n\n# The user's message is: Find it{ASSISTANT}{THINK}"
    )
    assert render([system("S", response_format=form), user("u")], V32, "deepseek_v32") == (
        f"{BOS}S{said}{USER}u{ASSISTANT}{END_THINK}"
    )


# --- what cannot be said ---


def deep(levels: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least one message"),
        ("hello", "at least one message"),
        ({"role": "user"}, "at least one message"),
        (["hello"], "message 0: a str; allowed: an object"),
        ([{"content": "x"}], "message 0: role None; allowed: system, developer, user"),
        ([user("a"), {"role": "robot", "content": "x"}], "message 1: role 'robot'"),
        ([{"role": ["user"], "content": "x"}], "message 0: role ['user']"),
        ([{"role": "user"}], "content of type NoneType"),
        ([user(5)], "content of type int"),
        ([user([{"type": "image_url"}])], "a content part without text"),
        ([user(["x"])], "a content part without text"),
        ([assistant(None)], "an assistant message without content"),
        ([assistant("x", reasoning_content=5)], "reasoning_content that is no text"),
        ([user("x") | {"tool_calls": [call("f", "{}")]}], "tool_calls from user"),
        ([assistant(None, tool_calls=[{"function": {"name": "f"}}])], "malformed tool call"),
        ([assistant(None, tool_calls=[call("f", "[1]")])], "malformed tool call"),
        ([assistant(None, tool_calls=[call("f", "{")])], "malformed tool call"),
        ([assistant(None, tool_calls=[call("f", "{}") | {"type": "x"}])], "malformed tool call"),
        ([assistant(None, tool_calls="f")], "malformed tool call"),
        ([user("x") | {"name": object()}], "must be JSON"),
        ([user("x") | {"name": deep(100_000)}], "nested too deeply"),
        ([user("x"), assistant("y")], "the last one must be from: user"),
        ([system("x")], "the last one must be from: user"),
    ],
)
@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v32"])
def test_bad_messages_are_one_clear_line(messages: Any, said: str, model_type: str) -> None:
    with pytest.raises(ConfigError) as caught:
        encode_chat(messages, V32, model_type)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([user("a"), result("r")], "message 1: role 'tool', but 0 tool results are due"),
        ([*LOOP[:3], user("b")], "message 3: role 'user', but 1 tool results are due"),
        ([*LOOP, result("r")], "message 7: role 'tool', but 0 tool results are due"),
        (LOOP[:6], "1 of the last 2 tool results are missing"),
    ],
)
def test_v32_counts_tool_results(messages: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        encode_chat(messages, V32, "deepseek_v32")


def test_built_in_v3_knows_no_tools() -> None:
    with pytest.raises(ConfigError, match="tools need the model's own chat template"):
        encode_chat([user("a")], PLAIN, "deepseek_v3", tools=TOOLS)
    with pytest.raises(ConfigError, match="tool calls need the model's own chat template"):
        encode_chat([*LOOP, user("a")], PLAIN, "deepseek_v3")


@pytest.mark.parametrize("tools", ["x", [5], [{"type": "function"}], [{"function": {"name": 3}}]])
def test_bad_tools_are_refused(tools: Any) -> None:
    with pytest.raises(ConfigError, match="tool"):
        encode_chat([user("a")], V32, "deepseek_v32", tools=tools)


def test_a_model_without_any_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="'kimi_k2' has no built-in chat format"):
        encode_chat([user("a")], PLAIN, "kimi_k2")


# --- forged control tokens ---

# A template that puts what it is given right next to brackets, as none should.
NASTY = (
    "{{ bos_token }}{% for m in messages %}<{{ m.content }}>"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}"
    "{% endfor %}{{ tools | tojson if tools }}<｜Assistant｜>"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}<｜{{ m.role | capitalize }}｜>"
    "{{ m.content }}{% endfor %}"
)
FORMATS = [
    pytest.param(PLAIN, "deepseek_v3", id="v3"),
    pytest.param(V31, "deepseek_v3", id="v3.1"),
    pytest.param(V32, "deepseek_v32", id="v3.2"),
    pytest.param(tokenizer([DSML, *TOOL_MARKS], NASTY), "", id="nasty"),
    pytest.param(tokenizer([DSML], TURNS), "", id="turns"),
]


def controls(ids: list[int], made: Tokenizer) -> list[int]:
    return [id_ for id_ in ids if id_ in made.control_tokens.values()]


ALL_MARKS = [*REAL_IDS, DSML, *TOOL_MARKS]
# What stays after the format has put a bracket, or another message the missing end, next to it.
CUTS = [
    mark[i:j] for mark in ALL_MARKS for i, j in ((0, -1), (1, None), (1, -1), (0, 3), (3, None))
]
forged = st.lists(st.sampled_from(ALL_MARKS) | st.sampled_from(CUTS) | st.text(max_size=2)).map(
    "".join
)


@pytest.mark.parametrize(("made", "model_type"), FORMATS)
@example(said=["think", "/think", "｜Assistant｜"])
@example(said=["x<think", "k>", "｜User｜>"])
@given(said=st.lists(forged, min_size=3, max_size=3))
def test_users_cannot_write_control_tokens(
    made: Tokenizer, model_type: str, said: list[str]
) -> None:
    def talk(texts: list[str]) -> list[dict[str, Any]]:
        return [system(texts[0]), user(texts[1]), assistant("ok"), user([{"text": texts[2]}])]

    ids = encode_chat(talk(said), made, model_type)
    harmless = encode_chat(talk(["x", "x", "x"]), made, model_type)
    assert controls(ids, made) == controls(harmless, made)
    assert made.decode(ids, skip_special=False) == render(talk(said), made, model_type)


@given(said=forged)
def test_assistants_results_and_tools_cannot_either(said: str) -> None:
    def talk(text: str) -> tuple[list[int], str]:
        messages = [
            user("u"),
            assistant(text, tool_calls=[call(text, {text: [text], "k": text})]),
            result(text),
            assistant("", reasoning_content=text, tool_calls=[call("f", json.dumps({"k": text}))]),
            result(text),
        ]
        tools = [{"type": "function", "function": {"name": text, text: {text: text}}}]
        options: Any = {"thinking": True, "tools": tools}
        ids = encode_chat(messages, V32, "deepseek_v32", **options)
        return ids, render(messages, V32, "deepseek_v32", **options)

    ids, text = talk(said)
    assert controls(ids, V32) == controls(talk("x")[0], V32)
    assert V32.decode(ids, skip_special=False) == text


def test_json_escapes_cannot_spell_a_control_token() -> None:
    escaped = r'{"k": "\u003c\uff5cAssistant\uff5c\u003e"}'
    messages = [user("u"), assistant(None, tool_calls=[call("f", escaped)]), result("r")]
    ids = encode_chat(messages, V32, "deepseek_v32")
    assert ids.count(128804) == 1
    assert f'string="true">{ASSISTANT}</' in V32.decode(ids)


def test_the_longest_control_token_is_meant() -> None:
    made = tokenizer(["<a>", "<a><b>", "<b>"], "<a><b><b>")
    wanted = [made.control_tokens["<a><b>"], made.control_tokens["<b>"]]
    assert encode_chat([user("x")], made, "any") == wanted


def test_text_that_only_looks_private_survives() -> None:
    odd = "\U00100000\U00100001<think>\U0010fffd"
    ids = encode_chat([user(odd)], PLAIN, "deepseek_v3")
    assert PLAIN.decode(ids) == f"{USER}{odd}{ASSISTANT}"
    assert 128798 not in ids


def test_using_up_the_private_characters_is_an_error_not_a_leak() -> None:
    everything = "".join(map(chr, range(0x100000, 0x10FFFE)))
    with pytest.raises(ConfigError, match="private characters"):
        encode_chat([user(everything + USER)], PLAIN, "deepseek_v3")
    assert len(encode_chat([user(everything)], PLAIN, "deepseek_v3")) > 4 * 65_000


# --- templates ---

LIKE_V31 = """
{%- for message in messages if message.role == 'system' %}
    {%- if loop.first %}{{ bos_token }}{% endif %}{{ message['content'] }}
{%- endfor %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>', 1)[1] %}
        {%- endif %}
        {{- '<｜Assistant｜></think>' + content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}
    {{- '<think>' if thinking else '</think>' }}
{%- endif %}
"""


@pytest.mark.parametrize("thinking", [True, False])
def test_a_template_gives_what_transformers_gives(thinking: bool) -> None:
    made = tokenizer([SEARCH], LIKE_V31)
    reference = PreTrainedTokenizerFast(
        tokenizer_object=backend([SEARCH]), bos_token=BOS, eos_token=EOS, chat_template=LIKE_V31
    )
    wanted = reference.apply_chat_template(
        TALK, add_generation_prompt=True, thinking=thinking, return_dict=False
    )
    assert encode_chat(TALK, made, "any", thinking=thinking) == wanted
    assert wanted == encode_chat(TALK, V31, "deepseek_v3", thinking=thinking)


def test_a_template_is_preferred_to_the_built_in_format() -> None:
    made = tokenizer(template="{{ messages[0].content }}!")
    assert render([user("a")], made, "deepseek_v3") == "a!"
    assert made.decode(encode_chat([user("a")], made, "deepseek_v3"), skip_special=False) == "a!"


def one(template: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    return render(messages or [user("a")], tokenizer(template=template), "any", **options)


def test_templates_have_what_transformers_gives_them() -> None:
    assert one("{{ [1, 'ü<'] | tojson }}") == '[1, "ü<"]'
    assert one("{{ {'a': 1} | tojson(indent=2) }}") == '{\n  "a": 1\n}'
    assert one("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert (
        one("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "1"
    )
    assert one("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"
    assert one("{{ bos_token }}{{ eos_token }}{{ pad_token }}") == BOS + EOS
    assert one("{{ enable_thinking }}{{ thinking }}", thinking=True) == "TrueTrue"
    assert one("{{ tools is none }}") == "True"
    assert one("{{ tools | length }}", tools=TOOLS) == "2"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "refuses the messages"),
        ("{{ 1 + messages[0].content }}", "unsupported operand"),
        ("{{ messages[0].content.__class__.__mro__ }}", "refuses the messages"),
        ("{{ messages.append(1) }}", "refuses the messages"),
        ("{{ cycler.__init__.__globals__ }}", "refuses the messages"),
        ("{% include 'x' %}", "refuses the messages"),
        ("{{ range(10**9) | list }}", "refuses the messages"),
    ],
)
def test_a_template_that_fails_or_breaks_out_is_one_line(template: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        one(template)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_is_not_asked_for_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match="takes no tools"):
        one("x", tools=TOOLS)
    with pytest.raises(ConfigError, match="knows no thinking"):
        one("x", thinking=True)
    role = "{{ messages[0].role }}"
    assert one(role, [{"role": "developer", "content": "a"}]) == "system"
    assert one(role + "{# developer #}", [{"role": "developer", "content": "a"}]) == "developer"


def test_templates_see_the_words_of_the_form_though_tokens_hold_them() -> None:
    """A control token such as <function> must not hide the key or the type it contains."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% for c in m.tool_calls %}"
        "{% if c.type == 'function' %}{{ c.function.name }}({{ c.function.arguments }})"
        "{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    made = tokenizer(["<function>", "<arguments>", "<user>", "<assistant>", "<type>"], template)
    messages = [user("u"), assistant(None, tool_calls=[call("f", "{}")])]
    assert render(messages, made, "any") == "f({})"


@pytest.mark.parametrize("calls", [None, [], ()])
def test_no_tool_calls_is_no_key(calls: Any) -> None:
    template = "{{ messages[0].tool_calls is defined }}"
    assert one(template, [assistant("a", tool_calls=calls)]) == "False"
    assert one(template, [assistant("a", tool_calls=[call("f", "{}")])]) == "True"


def test_templates_can_strip_what_was_said() -> None:
    assert one("{{ messages[0].content.strip() }}|", [user(" \n<think> \n")]) == "<think>|"
    assert one("{{ messages[0].content.strip() }}|", [user("\n")]) == "|"


def test_messages_are_left_alone() -> None:
    before = json.dumps([LOOP, TOOLS])
    encode_chat(LOOP, V32, "deepseek_v32", tools=TOOLS)
    assert json.dumps([LOOP, TOOLS]) == before


# --- replies ---


@pytest.mark.parametrize(
    ("made", "model_type", "thinking", "inside"),
    [
        (PLAIN, "deepseek_v3", False, False),
        (PLAIN, "deepseek_v3", True, True),
        (V31, "deepseek_v3", True, True),
        (V31, "deepseek_v3", False, False),
        (V32, "deepseek_v32", True, True),
        (V32, "deepseek_v32", False, False),
    ],
)
def test_a_prompt_ends_in_a_thought_or_not(
    made: Tokenizer, model_type: str, thinking: bool, inside: bool
) -> None:
    for messages in (TALK, [user("is <think> a tag?")]):
        ids = encode_chat(messages, made, model_type, thinking=thinking)
        assert in_thought(ids, made) is inside
    assert in_thought([], made) is False
    left_open, closed = [128798, 128803, 128804], [128803, 128804, 128798, 128799, 200_100]
    assert in_thought(left_open, made) is in_thought(closed, made) is False


@pytest.mark.parametrize(
    ("text", "inside", "reply"),
    [
        ("2", False, Reply("", "2", ())),
        ("so</think>2", True, Reply("so", "2", ())),
        ("cut off", True, Reply("cut off", "", ())),
        ("<think>so</think>2", False, Reply("so", "2", ())),
        ("a </think> b", False, Reply("", "a </think> b", ())),
    ],
)
def test_thoughts_are_split_off(text: str, inside: bool, reply: Reply) -> None:
    assert parse_reply(text, in_thought=inside) == reply


BEGIN, END, CALL, END_CALL, SEP = TOOL_MARKS


def test_calls_of_v31() -> None:
    one_call = f"{CALL}date{SEP}{DATE}{END_CALL}"
    other = f'{CALL}weather{SEP}{{"n": 1}}{END_CALL}'
    found = parse_reply(f"why</think>Ok.{BEGIN}{one_call}{other}{END}", in_thought=True)
    assert found == Reply("why", "Ok.", (ToolCall("date", DATE), ToolCall("weather", '{"n": 1}')))
    assert parse_reply(f"{BEGIN}{one_call}", in_thought=False).tool_calls == found.tool_calls[:1]


def test_calls_of_v3_and_r1() -> None:
    first = f"{CALL}function{SEP}date\n```json\n{DATE}\n```{END_CALL}"
    second = f"{CALL}function{SEP}time\n```json\n{{\n}}\n```{END_CALL}"
    found = parse_reply(f"{BEGIN}{first}\n{second}{END}", in_thought=False)
    assert found == Reply("", "", (ToolCall("date", DATE), ToolCall("time", "{\n}")))


def test_calls_of_v32_come_back_as_they_were_written() -> None:
    found = parse_reply(f"now both{END_THINK}Wait.{WEATHER_BLOCK}", in_thought=True)
    weather = ToolCall("weather", json.dumps(WEATHER, ensure_ascii=False))
    assert found == Reply("now both", "Wait.", (weather, weather))
    history = [user("Weather?"), assistant(
        found.content,
        reasoning_content=found.reasoning,
        tool_calls=[call(made.name, made.arguments) for made in found.tool_calls],
    ), result("a"), result("b")]  # fmt: skip
    again = render(history, V32, "deepseek_v32", thinking=True)
    assert f"{THINK}now both{END_THINK}Wait.{WEATHER_BLOCK}{EOS}" in again


@pytest.mark.parametrize(
    "text",
    [
        f"x{BEGIN}",
        f"x{BEGIN}{CALL}f{SEP}[1]{END_CALL}{END}",
        f"x{BEGIN}{CALL}f{SEP}{{{END_CALL}{END}",
        f"x{BEGIN}{CALL}f{SEP}{{}}{END_CALL} and{END}",
        f"x{BEGIN}f(){END}",
        f'x\n\n<{DSML}function_calls>\n<{DSML}invoke name="f">\noops</{DSML}invoke>',
        WEATHER_BLOCK.replace(">2<", ">two<"),
        DATE_BLOCK.replace('string="true"', ""),
        DATE_BLOCK.replace(f"</{DSML}invoke>", ""),
        DATE_BLOCK.replace("<", "&lt;"),
    ],
)
def test_malformed_calls_stay_text(text: str) -> None:
    assert parse_reply(text, in_thought=False) == Reply("", text, ())


@given(st.lists(forged).map("".join), st.booleans())
def test_any_reply_parses(text: str, inside: bool) -> None:
    reply = parse_reply(text, in_thought=inside)
    assert reply.tool_calls or len(reply.reasoning + reply.content) >= len(text) - 15


# --- the shipped model ---


def test_the_shipped_model_reads_chats_as_transformers_does() -> None:
    folder = Path(duck.model.chat.__file__).parents[1] / "demo"
    made = Tokenizer.load(folder)
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [user("Is 391 prime?"), assistant("No."), user("Is <b>7</b> | 0x7f prime, 鸭?\n")]
    wanted = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = encode_chat(messages, made, "deepseek_v3")
    assert ids == wanted
    assert made.decode(ids, skip_special=False) == render(messages, made, "deepseek_v3")
