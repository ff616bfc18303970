"""The peers of benchmarks/engine_cpu.py, each run in a process of its own: prints one JSON object; exit status 75
where not installed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PEERS = ("transformers", "llama.cpp")
_ABSENT = 75


def _model(checkpoint: str, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()


def _generate(model: Any, prompts: list[list[int]], tokens: int) -> Any:
    import torch

    ids = torch.tensor(prompts)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        eos_token_id=None,
        pad_token_id=0,
    )


def transformers_texts(checkpoint: str, prompts: list[list[int]], tokens: int, dtype: str) -> dict[str, Any]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(checkpoint, "tokenizer.json")))
    out = _generate(_model(checkpoint, dtype), prompts, tokens)
    return {"texts": [tokenizer.decode(row[len(prompts[0]) :].tolist(), skip_special_tokens=True) for row in out]}


def transformers_decode(
    checkpoint: str, prompts: list[list[int]], tokens: int, runs: int, dtype: str
) -> dict[str, Any]:
    """Output tokens a second, prefill taken off: two lengths, and what lies between."""
    model = _model(checkpoint, dtype)
    _generate(model, prompts, 2)
    rates = []
    for _ in range(runs):
        seconds = []
        for length in (2, tokens):
            began = time.perf_counter()
            _generate(model, prompts, length)
            seconds.append(time.perf_counter() - began)
        rates.append(len(prompts) * (tokens - 2) / (seconds[1] - seconds[0]))
    return {"rates": rates}


def transformers_continuous(checkpoint: str, requests: list[tuple[list[int], int]], dtype: str) -> dict[str, Any]:
    """Its continuous batching manager, fed with all requests at once."""
    from transformers import GenerationConfig
    from transformers.generation.continuous_batching import ContinuousBatchingManager  # noqa: F401

    model = _model(checkpoint, dtype)
    config = GenerationConfig(do_sample=False, max_new_tokens=128, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(generation_config=config)
    manager.start()
    try:
        began = time.perf_counter()
        for index, (prompt, tokens) in enumerate(requests):
            manager.add_request(prompt, request_id=f"r{index}", max_new_tokens=tokens)
        left = {f"r{index}": tokens for index, (_, tokens) in enumerate(requests)}
        while left:
            answer = manager.get_result(timeout=3600)
            if answer is None:
                raise RuntimeError(f"continuous batching ended with {len(left)} requests unanswered")
            if answer.is_finished():
                wanted = left.pop(answer.request_id)
                assert len(answer.generated_tokens) == wanted, (len(answer.generated_tokens), wanted)
        return {"seconds": time.perf_counter() - began}
    finally:
        manager.stop(block=True)


def _gguf(checkpoint: str) -> str:
    """The checkpoint in llama.cpp's format, beside it."""
    import gguf
    import torch
    from safetensors.torch import load_file

    path = str(Path(checkpoint, "model.gguf"))
    if os.path.exists(path):
        return path
    config = json.loads(Path(checkpoint, "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    heads, kv_heads, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(d)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("llama")
    names = [f"<{i}>".encode() for i in range(config["vocab_size"])]
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * len(names))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(names))
    layer_names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    tops = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for name, tensor in load_file(Path(checkpoint, "model.safetensors")).items():
        if name in tops:
            target = tops[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            target = f"blk.{layer}.{layer_names[rest.removesuffix('.weight')]}.weight"
        if tensor.ndim == 1:
            writer.add_tensor(target, tensor.float().numpy())
            continue
        count = {"attn_q": heads, "attn_k": kv_heads}.get(target.split(".")[-2])
        if count:  # its rotary pairs are neighbours, transformers' are half a head apart
            tensor = tensor.view(count, 2, d // 2, -1).transpose(1, 2).reshape(tensor.shape)
        data = tensor.contiguous().view(torch.uint16).numpy()
        writer.add_tensor(target, data.view("uint8"), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_decode(checkpoint: str, prompts: list[list[int]], tokens: int, runs: int, dtype: str) -> dict[str, Any]:
    """Through its C interface: one batch holds a token of every sequence."""
    import ctypes

    import llama_cpp

    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(_gguf(checkpoint).encode(), parameters)
    context = llama_cpp.llama_context_default_params()
    count, length = len(prompts), len(prompts[0])
    context.n_ctx, context.n_batch, context.n_seq_max = count * 512, 512, count
    context.n_threads = context.n_threads_batch = int(os.environ["OMP_NUM_THREADS"])
    ctx = llama_cpp.llama_init_from_model(model, context)
    batch = llama_cpp.llama_batch_init(512, 0, count)
    vocabulary = json.loads(Path(checkpoint, "config.json").read_text())["vocab_size"]

    def put(rows: list[tuple[int, int, int, bool]]) -> None:
        for at, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
            batch.seq_id[at][0], batch.logits[at] = sequence, wanted
        batch.n_tokens = len(rows)
        if llama_cpp.llama_decode(ctx, batch):
            raise RuntimeError("llama_decode failed")

    def best(row: int) -> int:
        import numpy as np

        pointer = llama_cpp.llama_get_logits_ith(ctx, row)
        return int(np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (vocabulary,)).argmax())

    rates = []
    for _ in range(runs):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
        last = []
        for sequence, prompt in enumerate(prompts):
            put([(token, i, sequence, i == length - 1) for i, token in enumerate(prompt)])
            last.append(best(length - 1))
        began = time.perf_counter()
        for step in range(tokens - 1):
            put([(token, length + step, sequence, True) for sequence, token in enumerate(last)])
            last = [best(row) for row in range(count)]
        rates.append(count * (tokens - 1) / (time.perf_counter() - began))
    return {"rates": rates}


TASKS: dict[tuple[str, str], Callable[..., dict[str, Any]]] = {
    ("transformers", "texts"): transformers_texts,
    ("transformers", "decode"): transformers_decode,
    ("transformers", "continuous"): transformers_continuous,
    ("llama.cpp", "decode"): llama_decode,
}


def main() -> int:
    name, task, checkpoint, arguments = sys.argv[1:]
    try:
        answer = TASKS[name, task](checkpoint, **json.loads(arguments))
    except ImportError as error:
        print(error, file=sys.stderr)
        return _ABSENT
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
