"""Reading config.json: both spellings of transformers, its defaults, and a sentence for all that cannot be served."""

from __future__ import annotations

import dataclasses

import pytest

from arriero_plan.known import known_config, known_names
from arriero_plan.memory import count_parameters
from arriero_plan.model import Llama3RopeScaling, ModelError, ModelShape, Quantization


def shape_of(config):
    return ModelShape.from_config(config, "config.json")


def test_llama_3_1_8b(config):
    assert shape_of(config("8B")) == ModelShape(
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=128256,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 8192),
        max_position_embeddings=131072,
        sliding_window=None,
        dtype="bfloat16",
        attention_bias=False,
        mlp_bias=False,
        eos_token_ids=(128001, 128008, 128009),
        bos_token_id=128000,
        quantization=None,
    )


def test_both_spellings_of_transformers_mean_the_same(config):
    old = config("70B")
    new = config("70B", rope_parameters=old["rope_scaling"] | {"rope_theta": 500000.0}, dtype="bfloat16")
    for name in ("rope_theta", "rope_scaling", "torch_dtype"):
        del new[name]
    older = config("70B")
    older["rope_scaling"]["type"] = older["rope_scaling"].pop("rope_type")
    assert shape_of(new) == shape_of(old) == shape_of(older)


def test_absent_fields_mean_what_they_mean_to_transformers():
    minimal = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 100,
    }
    shape = shape_of(minimal)
    assert (shape.num_kv_heads, shape.head_dim, shape.rope_theta, shape.rope_scaling) == (4, 16, 10000.0, None)
    assert (shape.rms_norm_eps, shape.max_position_embeddings, shape.dtype) == (1e-6, 2048, "float32")
    assert (shape.bos_token_id, shape.eos_token_ids, shape.tie_word_embeddings) == (1, (2,), False)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"head_dim": 96}, "head_dim", 96),
        ({"head_dim": None}, "head_dim", 128),
        ({"num_key_value_heads": None}, "num_kv_heads", 32),
        ({"num_key_value_heads": 1}, "num_kv_heads", 1),
        ({"sliding_window": 4096}, "sliding_window", 4096),
        ({"sliding_window": 4096, "use_sliding_window": False}, "sliding_window", None),
        ({"eos_token_id": 7}, "eos_token_ids", (7,)),
        ({"eos_token_id": None}, "eos_token_ids", ()),
        ({"bos_token_id": None}, "bos_token_id", None),
        ({"rope_scaling": {"rope_type": "default"}}, "rope_scaling", None),
        ({"rope_scaling": None}, "rope_scaling", None),
        ({"torch_dtype": "torch.float16"}, "dtype", "float16"),
        ({"dtype": "float32"}, "dtype", "float32"),
        ({"rope_theta": 10000}, "rope_theta", 10000.0),
        ({"attention_bias": True}, "attention_bias", True),
        ({"mlp_bias": True}, "mlp_bias", True),
        ({"tie_word_embeddings": True}, "tie_word_embeddings", True),
    ],
)
def test_a_field_is_read(config, changes, field, value):
    assert getattr(shape_of(config("8B", **changes)), field) == value


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OLD_CONTEXT = {"original_max_position_embeddings": 8192}
INVALID = [
    (
        {"architectures": ["MistralForCausalLM"]},
        "architectures is ['MistralForCausalLM']: only LlamaForCausalLM is supported",
    ),
    ({"architectures": []}, "architectures is []: only LlamaForCausalLM is supported"),
    ({"architectures": None, "model_type": "qwen2"}, "model_type is 'qwen2': only llama is supported"),
    ({"architectures": None, "model_type": None}, "neither architectures nor model_type is set"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu': only silu is supported"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "4096"}, "hidden_size is '4096': expected a whole number"),
    ({"hidden_size": 4097}, "hidden_size is 4097, which num_attention_heads (32) does not divide"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0: expected a number from 1 to 1000"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True: expected a whole number"),
    ({"num_attention_heads": -1}, "num_attention_heads is -1: expected a number from 1"),
    ({"num_key_value_heads": 5}, "num_attention_heads is 32, which num_key_value_heads (5) does not divide"),
    ({"head_dim": 127}, "head_dim is 127: rotary embeddings need an even one"),
    ({"intermediate_size": 14336.5}, "intermediate_size is 14336.5: expected a whole number"),
    ({"vocab_size": 10**12}, "vocab_size is 1000000000000: expected a number from 1 to"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1: expected true or false"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0: expected a number above 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan: expected a number above 0"),
    ({"rope_theta": "big"}, "rope_theta is 'big': expected a number"),
    ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3': expected an object"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.rope_type is 'linear': only llama3 and default"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type is 'yarn': only llama3 and default"),
    ({"rope_scaling": ROPE}, "rope_scaling.original_max_position_embeddings is missing"),
    ({"rope_scaling": ROPE | {"factor": 0.5}}, "rope_scaling.factor is 0.5: expected a number of at least 1"),
    (
        {"rope_scaling": ROPE | OLD_CONTEXT | {"high_freq_factor": 1.0}},
        "high_freq_factor is 1, not above low_freq_factor",
    ),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5: only 1.0"),
    ({"sliding_window": 0}, "sliding_window is 0: expected a number from 1"),
    ({"torch_dtype": "float64"}, "torch_dtype is 'float64': expected one of float32, float16, bfloat16"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>': expected a token id or a list of them"),
    ({"eos_token_id": [1, 200000]}, "eos_token_id is [1, 200000], outside the vocabulary of 128256 tokens"),
    ({"bos_token_id": -1}, "bos_token_id is -1, outside the vocabulary"),
    ({"quantization_config": "fp8"}, "quantization_config is 'fp8': expected an object"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config.quant_method is 'bitsandbytes'"),
    ({"quantization_config": {"quant_method": "awq", "bits": 3}}, "bits is 3, only 4 and 8 are supported"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.bits is missing"),
    (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
        "weight_block_size is [128]: expected two positive whole numbers",
    ),
    (
        {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["re:("]}},
        "modules_to_not_convert has 're:(', no valid pattern",
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), INVALID)
def test_what_cannot_be_served_is_said_in_one_sentence(config, changes, sentence):
    with pytest.raises(ModelError) as caught:
        shape_of(config("8B", **changes))
    message = str(caught.value)
    assert message.startswith("config.json: ")
    assert sentence in message
    assert "\n" not in message


@pytest.mark.parametrize("document", [[], "llama", None, 3])
def test_a_config_must_be_an_object(document):
    with pytest.raises(ModelError, match=r"config\.json: expected a JSON object"):
        shape_of(document)


COMPRESSED = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]},
            Quantization("fbgemm_fp8", "fp8", None, None, ("lm_head",)),
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Quantization("fp8", "fp8", None, (128, 128), ())),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, Quantization("awq", "int4", 128, None, ())),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, Quantization("gptq", "int8", None, None, ())),
        (
            COMPRESSED | {"config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8}}}},
            Quantization("compressed-tensors", "fp8", None, None, ("lm_head",)),
        ),
        (
            COMPRESSED | {"config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 4, "group_size": 64}}}},
            Quantization("compressed-tensors", "int4", 64, None, ("lm_head",)),
        ),
    ],
)
def test_what_a_quantised_checkpoint_holds(config, section, expected):
    assert shape_of(config("8B", quantization_config=section)).quantization == expected


def test_the_known_models_have_their_published_sizes():
    """Parameters as the model cards state them, in billions."""
    published = {
        "meta-llama/Llama-3.2-1B": 1.24,
        "meta-llama/Llama-3.2-3B-Instruct": 3.21,
        "meta-llama/Meta-Llama-3-8B": 8.03,
        "meta-llama/Llama-3.1-8B-Instruct": 8.03,
        "meta-llama/Llama-3.1-70B": 70.55,
        "meta-llama/Llama-3.3-70B-Instruct": 70.55,
        "meta-llama/Meta-Llama-3.1-405B-Instruct": 405.85,
    }
    assert published.keys() <= set(known_names())
    for name, billions in published.items():
        shape = ModelShape.from_config(known_config(name), name)
        assert round(count_parameters(shape) / 1e9, 2) == billions


def test_known_models_agree_with_the_configs_written_in_the_tests(config):
    for size in ("8B", "70B", "405B"):
        known = ModelShape.from_config(known_config(f"meta-llama/Llama-3.1-{size}-Instruct"), size)
        assert dataclasses.asdict(known) == dataclasses.asdict(shape_of(config(size)))


@pytest.mark.parametrize(
    "name",
    ["llama", "meta-llama/Llama-2-7b", "someone/Llama-3.1-8B", "meta-llama/Llama-3.1-9B", "meta-llama/Llama-3.3-70B"],
)
def test_other_names_are_not_guessed(name):
    assert known_config(name) is None
