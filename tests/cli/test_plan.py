"""`arriero plan`: what it prints, where, and its exit status."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from arriero_cli.plan import add_parser
from arriero_plan.plan import Plan

EXAMPLES = Path(__file__).parents[2] / "examples"
DEPLOYMENT = """
apiVersion: serving.arriero.dev/v1alpha1
kind: LlamaDeployment
metadata: {name: small}
spec:
  model: {name: small, source: {hostPath: {path: checkpoint}}, maxContext: 64}
  accelerator: {type: cpu}
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
}


@pytest.fixture
def arriero(capsys):
    """arriero(*words) -> (exit status, stdout, stderr)."""

    def call(*words):
        parser = argparse.ArgumentParser()
        add_parser(parser.add_subparsers())
        args = parser.parse_args([str(word) for word in words])
        status = args.run(args)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def file(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(CONFIG))
    path = tmp_path / "small.yaml"
    path.write_text(DEPLOYMENT)
    return path


@pytest.mark.parametrize(
    ("name", "layout"),
    [("llama-3.1-8b.yaml", "tensor 1 x pipeline 1"), ("llama-3.1-70b.yaml", "tensor 8 x pipeline 1")],
)
def test_the_examples_plan_without_a_network(arriero, name, layout):
    status, out, err = arriero("plan", EXAMPLES / name)
    assert (status, err) == (0, "")
    assert layout in out
    assert "…" not in out


def test_a_relative_path_begins_at_the_file(arriero, file):
    status, out, _ = arriero("plan", file)
    assert status == 0
    # 2 x (4 x 64 x 64 + 3 x 64 x 96 + 2 x 64) + 2 x 100 x 64 + 64 = 82,752.
    assert "small, 0.08 M parameters" in out


def test_json_is_the_plan(arriero, file):
    status, out, _ = arriero("plan", file, "-o", "json")
    assert status == 0
    plan = Plan.model_validate_json(out)
    assert (plan.world, plan.max_context, plan.dtype) == (1, 64, "float32")


def test_a_config_given_by_hand_wins(arriero, file, tmp_path):
    config = tmp_path / "other.json"
    config.write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
    _, out, _ = arriero("plan", file, "-o", "json", "--config", config)
    assert Plan.model_validate_json(out).stages[-1].end_layer == 3


def test_what_the_engine_does_not_run_is_noted(arriero, file):
    file.write_text(DEPLOYMENT.replace("maxContext: 64", "maxContext: 64, weights: fp8"))
    status, out, _ = arriero("plan", file)
    assert status == 0
    assert "spec.model.weights is fp8; on a cpu the engine runs float32 and bfloat16" in " ".join(out.split())


def test_what_cannot_fit_exits_1_with_the_arithmetic(arriero, tmp_path):
    path = tmp_path / "big.yaml"
    path.write_text((EXAMPLES / "llama-3.1-70b.yaml").read_text().replace("tensor: 8", "tensor: 2\n    pipeline: 1"))
    status, out, err = arriero("plan", path)
    assert (status, out) == (1, "")
    assert err.startswith(f"{path}: llama-70b: needs 90.6 GiB per device, has 79.1: weights 65.8 + KV 20.0")
    assert err.endswith("tensor: 4 would fit\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (DEPLOYMENT.replace("accelerator", "acelerator"), "spec.acelerator: unknown field; did you mean accelerator?"),
        (DEPLOYMENT.replace("checkpoint", "nowhere"), "nowhere/config.json: no such file or directory"),
        (
            DEPLOYMENT.replace("{hostPath: {path: checkpoint}}", "{image: {reference: x}}"),
            "small is no public Llama 3 model: name its config.json with --config FILE",
        ),
        ("", "empty: expected a LlamaDeployment"),
    ],
)
def test_what_is_invalid_exits_2(arriero, file, text, sentence):
    file.write_text(text)
    status, out, err = arriero("plan", file)
    assert (status, out) == (2, "")
    assert sentence in err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "config.json: not JSON"),
        (b"\xff\xfe", "config.json: not UTF-8 text"),
        (b"[" * 100_000, "config.json: nested too deeply"),
        (b"{}", "config.json: neither architectures nor model_type is set"),
    ],
)
def test_a_broken_config_exits_2(arriero, file, content, sentence):
    (file.parent / "checkpoint" / "config.json").write_bytes(content)
    status, _, err = arriero("plan", file)
    assert status == 2
    assert sentence in err
    assert err.count("\n") == 1


def test_a_file_that_is_not_there(arriero, tmp_path):
    status, _, err = arriero("plan", tmp_path / "absent.yaml")
    assert (status, err) == (2, f"{tmp_path / 'absent.yaml'}: no such file or directory\n")
