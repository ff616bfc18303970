"""Tokens to text and back: detokenizer, stop strings, tool calls, chat template, tokenizer."""

from __future__ import annotations

import asyncio
import json
import random
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from arriero_worker.front.text.chat_template import ChatTemplate, TemplateRefusal, load_chat_template
from arriero_worker.front.text.detokenizer import Detokenizer
from arriero_worker.front.text.generation_config import load_generation_defaults
from arriero_worker.front.text.stop import StopMatcher, StopStrings
from arriero_worker.front.text.tokenizer import PromptTooLong, Tokenizer, load_tokenizer
from arriero_worker.front.text.tools import ToolCall, ToolGate, parse_tool_calls
from arriero_worker.front.text.vocabulary import TokenizerError, Vocabulary

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tiny_llama" / "checkpoint"


def whole(vocabulary: Vocabulary, ids: list[int]) -> str:
    detokenizer = Detokenizer(vocabulary)
    return "".join(detokenizer.feed(id) for id in ids) + detokenizer.finish()


@pytest.mark.parametrize("directory", ["model", "example"])
def test_detokenizer_equals_the_tokenizers_own_decoding(directory: str, model: Path, seed: int) -> None:
    path = model if directory == "model" else EXAMPLE
    backend = Backend.from_file(str(path / "tokenizer.json"))
    vocabulary = load_tokenizer(path).vocabulary
    rng = random.Random(seed)
    for _ in range(300):
        ids = [rng.randrange(vocabulary.size) for _ in range(rng.randrange(40))]
        assert whole(vocabulary, ids) == backend.decode(ids, skip_special_tokens=True)


@cache
def example() -> Tokenizer:
    return load_tokenizer(EXAMPLE)


@settings(deadline=None)
@given(st.text())
def test_detokenizer_gives_back_any_text_and_never_cuts_a_character(text: str) -> None:
    tokenizer = example()
    detokenizer = Detokenizer(tokenizer.vocabulary, visible=tokenizer.vocabulary.special)
    pieces = [detokenizer.feed(id) for id in tokenizer.encode(text, special=False)]
    assert detokenizer.finish() == ""
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_a_sequence_that_ends_inside_a_character_ends_in_a_replacement_character(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode("a😀", special=False)
    assert len(ids) == 5
    for cut, expected in [(2, "a\ufffd"), (4, "a\ufffd"), (5, "a😀")]:
        assert whole(tokenizer.vocabulary, ids[:cut]) == expected


def test_special_tokens_have_no_text_unless_asked_for(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    tag = tokenizer.id_of("<|python_tag|>")
    assert tag is not None
    assert Detokenizer(tokenizer.vocabulary).feed(tag) == ""
    assert Detokenizer(tokenizer.vocabulary, frozenset({tag})).feed(tag) == "<|python_tag|>"
    assert Detokenizer(tokenizer.vocabulary).feed(10**6) == ""


def test_sentencepiece_tokens_lose_their_first_space_only() -> None:
    names = ["<unk>", "▁he", "llo", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    backend = Backend(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    vocabulary = Vocabulary(backend, "here")
    for ids in ([1, 2, 1, 2], [3, 4, 5, 6, 7], [2, 3, 3, 1]):
        assert whole(vocabulary, ids) == backend.decode(ids)


def test_a_tokenizer_that_cannot_serve_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: "):
        load_tokenizer(tmp_path)
    Backend(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="neither byte-level nor SentencePiece"):
        load_tokenizer(tmp_path)


# -- stop strings


def by_scanning(stops: list[str], text: str) -> tuple[str, str | None]:
    """What a matcher must do, by trying every end of the text in order."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
    st.text("abc", max_size=24),
    st.lists(st.integers(1, 5), max_size=24),
)
def test_stop_strings_are_found_however_the_text_is_cut(stops: list[str], text: str, cuts: list[int]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    out, at = "", 0
    for size in [*cuts, len(text)]:
        out += matcher.feed(text[at : at + size])
        at += size
        expected, stop = by_scanning(stops, text[:at])
        assert expected.startswith(out), "nothing is emitted that a stop string may still take back"
        if matcher.matched is not None:
            assert (out, matcher.matched) == (expected, stop)
            return
        held = text[len(out) : at]
        assert any(s.startswith(held) and s != held for s in stops) or held == "", "no more is held back than needed"
    assert out + matcher.finish() == by_scanning(stops, text)[0]


# -- tool calls

NAMES = frozenset({"f", "get_weather"})


@pytest.mark.parametrize(
    ("answer", "calls"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', [ToolCall("f", '{"a": 1}')]),
        ('<|python_tag|>{"name": "f", "arguments": {}}', [ToolCall("f", "{}")]),
        (
            '{"name":"f","parameters":{}}; {"name":"get_weather","parameters":{"c":"Zürich"}}',
            [ToolCall("f", "{}"), ToolCall("get_weather", '{"c": "Zürich"}')],
        ),
        ('[{"name":"f","parameters":{}}]', [ToolCall("f", "{}")]),
        ('{"name": "unknown", "parameters": {}}', []),
        ('{"name": "f", "parameters": [1]}', []),
        ('{"name": "f", "parameters": {}} and more', []),
        ('{"name": "f"', []),
        ("[" * 100_000, []),
        ("plain text", []),
        ("", []),
    ],
)
def test_tool_calls_are_read_from_the_whole_answer(answer: str, calls: list[ToolCall]) -> None:
    assert parse_tool_calls(answer, NAMES) == calls


@pytest.mark.parametrize(
    ("pieces", "early", "late", "calls"),
    [
        (["Hello", " {"], ["Hello", " {"], "", 0),
        ([" ", "<|pyt", "x"], ["", "", " <|pytx"], "", 0),
        (['{"name": ', '"f", "parameters": {}}'], ["", ""], "", 1),
        (["<|python_tag|>", "print(1)"], ["", ""], "print(1)", 0),
        (["{not json"], [""], "{not json", 0),
    ],
)
def test_what_may_be_a_call_is_held_back(pieces: list[str], early: list[str], late: str, calls: int) -> None:
    gate = ToolGate(NAMES)
    assert [gate.feed(piece) for piece in pieces] == early
    text, found = gate.finish()
    assert (text, len(found)) == (late, calls)


# -- chat templates

CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "<b>&\"'é😀"}],
    [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"city": "Zürich"}}}],
        },
        {"role": "tool", "content": '{"t": 3}'},
        {"role": "assistant", "content": "Cold "},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"properties": {"é": 1}}}}]
GENERATION = (
    "{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}[{{ m.role }}]"
    "{% generation %}{{ m.content | trim }}{% endgeneration %}\n    {% if true %}  x\n{% endif %}{% endfor %}"
    "{{ {'a': '<é>', 'b': [1, none]} | tojson }}{{ tools | tojson(indent=2) if tools }}{{ eos_token }}{{ extra }}"
)


@pytest.mark.parametrize("source", ["model", "example", "generation"])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_rendering_equals_transformers(source: str, tools: list | None, conversation: list, model: Path) -> None:
    path = EXAMPLE if source == "example" else model
    tokenizer = load_tokenizer(path)
    theirs = PreTrainedTokenizerFast.from_pretrained(path)
    template = load_chat_template(path, tokenizer.config, tokenizer.special_tokens)
    extra: dict[str, str] = {}
    if source == "generation":
        theirs.chat_template = GENERATION
        template = ChatTemplate({"default": GENERATION}, tokenizer.special_tokens, "here")
        extra = {"extra": "more"}
    for flags in ({"add_generation_prompt": True}, {"add_generation_prompt": False}, {"continue_final_message": True}):
        flags.setdefault("add_generation_prompt", False)
        ours = template.render(conversation, tools=tools, variables=extra, **flags)
        assert ours == theirs.apply_chat_template(conversation, tools=tools, tokenize=False, **flags, **extra)
        ids = theirs.apply_chat_template(conversation, tools=tools, tokenize=True, **flags, **extra)["input_ids"]
        assert tokenizer.encode(ours, special=False) == ids


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only users here') }}", "only users here"),
        ("{{ messages[7].content.foo }}", "undefined|no element"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set x = 1 + 'a' %}", "unsupported operand"),
        ("{{ range(10**9) | list }}", "[Rr]ange too big"),
    ],
)
def test_a_template_that_fails_is_a_refusal(template: str, message: str) -> None:
    with pytest.raises(TemplateRefusal, match=message):
        ChatTemplate({"default": template}, {}, "here").render([{"role": "user", "content": "x"}])


def test_templates_are_found_where_checkpoints_keep_them(tmp_path: Path) -> None:
    def render(config: dict, tools: list | None = None) -> str:
        return load_chat_template(tmp_path, config, {}).render([{"role": "user", "content": "x"}], tools=tools)

    with pytest.raises(TemplateRefusal, match="no chat template"):
        render({})
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    assert render({"chat_template": "config"}) == "config"
    assert render({"chat_template": named}) == "plain"
    assert render({"chat_template": named}, TOOLS) == "tools"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert render({"chat_template": "config"}) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert render({"chat_template": "config"}) == "jinja"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja: chat template 'default'"):
        render({})


def test_generation_defaults(tmp_path: Path, model: Path) -> None:
    tokenizer = load_tokenizer(model)
    own = tokenizer.id_of("<|eot|>")
    (tmp_path / "config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load_generation_defaults(tmp_path, tokenizer).eos == (5, 6, own)
    values = {"eos_token_id": 7, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": "x", "repetition_penalty": 1e9}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    defaults = load_generation_defaults(tmp_path, tokenizer)
    assert defaults.eos == (7, own)
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.6, 0.9, 40)
    assert (defaults.min_p, defaults.repetition_penalty) == (0.0, 1.0), "nonsense counts as absent"


async def test_a_long_text_does_not_hold_up_the_loop(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    text = "the capital of France is Paris " * 20_000
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    ticking = asyncio.create_task(tick())
    (ids,) = await tokenizer.encode_soon([text], special=False, limit=10**9)
    ticking.cancel()
    assert ticks > 10
    assert tokenizer.decode(ids) == text
    with pytest.raises(PromptTooLong):
        await tokenizer.encode_soon([text], special=False, limit=1000)
    tokenizer.close()
