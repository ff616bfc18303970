"""The tokenizer of the tiny Llama: a byte-level BPE with Llama 3's pre-tokenizer and special tokens, and the chat
template.

Any UTF-8 text round-trips: all 256 bytes are tokens. Digits are single tokens, so sums line up digit by digit.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import data
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
# Llama 3's own, whose `\s*[\r\n]+` keeps "\n\n" one piece before a prompt's end as well as inside a text.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY = 2048


def render_prompt(messages: list[data.Message], tools: list[dict[str, object]]) -> list[tuple[str, bool]]:
    """The text of a conversation as (text, is the assistant's own) pieces that concatenate to what the chat template
    renders.
    """
    pieces = [("<|begin_of_text|>", False)]
    for message in messages:
        role = "ipython" if message["role"] == "tool" else message["role"]
        content = message["content"]
        if role == "user" and tools:
            lines = []
            for tool in tools:
                function = tool["function"]
                properties = json.dumps(function["parameters"]["properties"], ensure_ascii=False)  # type: ignore[index]
                lines.append(f"{function['name']}: {function['description']} {properties}\n")  # type: ignore[index]
            content = "Functions:\n" + "".join(lines) + "\n" + content
            tools = []
        pieces.append((f"<|start_header_id|>{role}<|end_header_id|>\n\n", False))
        pieces.append((f"{content}<|eot_id|>", role == "assistant"))
    return pieces


def corpus(seed: int) -> Iterator[str]:
    """Text in the proportions the merges should see; the lookup's words often enough to become single tokens."""
    rng = random.Random(seed)
    for _ in range(6000):
        for message in rng.choice((data.facts, data.facts, data.small_talk, data.recall))(rng):
            yield message["content"]
    for _ in range(600):
        tools, messages = data.tool_use(rng, True)
        yield "".join(text.replace("<|", "\n").replace("|>", "\n") for text, _ in render_prompt(messages, tools))
    for word in data.KEYS + data.VALUES:
        for _ in range(150):
            yield f" {word}"
    cities = [country["en"][1] for country in data.CAPITALS]
    for word in data.NAMES + cities + data.KEYS[:24]:
        for _ in range(250):
            yield f" {word}"
            yield word  # As it stands after a quotation mark, in a tool's arguments.
    for _ in range(60):
        for country in range(len(data.CAPITALS)):
            for lang in data.LANGUAGES:
                of, city = data.CAPITALS[country][lang]
                yield f" {of} {city}" if lang != "th" else f"ของ{of} คือ {city}"
    for template in data.ADD + data.SUBTRACT + data.LISTS + data.WHICH:
        for _ in range(200):
            yield template.replace("{", "").replace("}", "")
    for _ in range(500):
        yield "user\n\nassistant\n\nsystem\n\nipython\n\n"


def train(seed: int = 1) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # No merge may join two digits: split them apart while training only. The shipped pattern is Llama 3's own.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), split, byte_level]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    bos = (SPECIAL_TOKENS[0], tokenizer.token_to_id(SPECIAL_TOKENS[0]))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B", special_tokens=[bos]),
        ]
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template inside) to ``folder``."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
    fast.save_pretrained(folder, save_jinja_files=False)


if __name__ == "__main__":
    target = Path(__file__).parent / "checkpoint"
    target.mkdir(exist_ok=True)
    save(train(), target)
