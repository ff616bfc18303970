"""Accuracy of a tiny Llama checkpoint on held-out questions: `python evaluate.py [FOLDER] [--write]`.

An answer counts only if greedy decoding gives it token for token, up to and with <|eot_id|>. That is measured in one
forward pass over question and answer: greedy decoding yields exactly this answer if, and only if, every token of it is
the arg max at its place.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import data
import torch
from tokenizer import render_prompt
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

Question = tuple[list[dict[str, object]], list[data.Message]]
SEED = 2026
# Skill, number of questions, pairs in the list (lookup only).
SUITE = (
    ("facts", 320, 0),
    ("sums", 300, 0),
    ("differences", 100, 0),
    ("lookup", 200, 2),
    ("lookup", 200, 8),
    ("lookup", 100, 16),
    ("lookup", 100, 32),
    ("lookup", 50, 64),
    ("lookup", 50, 120),
    ("tools", 100, 0),
    ("tool_results", 100, 0),
)


def encode_question(tokenizer: PreTrainedTokenizerBase, question: Question) -> tuple[list[int], int]:
    """Token ids of the whole conversation, and how many of them are the last answer (with its <|eot_id|>)."""
    tools, messages = question
    pieces = [text for text, _ in render_prompt(messages, tools)]
    prompt = tokenizer.encode("".join(pieces[:-1]), add_special_tokens=False)
    answer = tokenizer.encode(pieces[-1], add_special_tokens=False)
    return prompt + answer, len(answer)


@torch.no_grad()
def correct(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[Question]) -> list[bool]:
    """Per question, whether greedy decoding gives its last message exactly."""
    encoded = [encode_question(tokenizer, question) for question in questions]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    result = [False] * len(encoded)
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        width = max(len(encoded[i][0]) for i in rows)
        # Padding stands on the right, where a causal model cannot see it.
        ids = torch.tensor([encoded[i][0] + [0] * (width - len(encoded[i][0])) for i in rows])
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        for row, i in enumerate(rows):
            tokens, answer = encoded[i]
            end = len(tokens)
            best = model.lm_head(hidden[row, end - answer - 1 : end - 1]).argmax(-1)
            result[i] = best.tolist() == tokens[end - answer :]
    return result


def label(skill: str, pairs: int) -> str:
    return f"{skill}_{pairs}_pairs" if pairs else skill


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, float]]:
    """Accuracy and number of questions for every entry of SUITE."""
    report = {}
    for skill, count, pairs in SUITE:
        marks = correct(model, tokenizer, data.held_out(skill, count, SEED, pairs or 8))
        report[label(skill, pairs)] = {"accuracy": round(sum(marks) / len(marks), 4), "questions": len(marks)}
    return report


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Measure a tiny Llama on questions it was not trained on.")
    parser.add_argument("folder", nargs="?", type=Path, default=here / "checkpoint")
    parser.add_argument("--write", action="store_true", help="record the figures in accuracy.json")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32).eval()
    report = evaluate(model, tokenizer)
    for name, figures in report.items():
        print(f"{name:20} {figures['accuracy']:7.1%} of {figures['questions']}")
    if arguments.write:
        target = here / "accuracy.json"
        record = json.loads(target.read_text()) if target.exists() else {}
        target.write_text(json.dumps(record | {"held_out": report}, indent=2) + "\n")


if __name__ == "__main__":
    main()
