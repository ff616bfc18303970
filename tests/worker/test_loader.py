"""What a rank reads of a checkpoint, and the sentence it says when it cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.worker.checkpoints import TINY, make_checkpoint, random_model
from tests.worker.stages import even_layout

from arriero_plan.launch import Layout
from arriero_plan.model import ModelError
from arriero_worker.model.checkpoint import Checkpoint
from arriero_worker.model.cpu.backend import CpuBackend
from arriero_worker.model.loader import CheckpointError, load_weights, random_weights, read_shape, weights_digest
from arriero_worker.model.shard import Shard, ShardError, TensorSlice

LAYER = "model.layers.1.self_attn.k_proj.weight"


class Keeping:
    """A backend that keeps the tensors it is given, to see what was read."""

    dtype = torch.float32
    hidden_dtype = torch.float32

    def pack_linear(
        self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, as_it_is: bool = False
    ) -> tuple[torch.Tensor, Any]:
        return weight_NK, bias_N

    def pack_table(self, weight_VH: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return weight_VH, None

    def pack_head(self, weight_VH: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return weight_VH, None

    def pack_vector(self, vector: torch.Tensor) -> torch.Tensor:
        return vector


def load(path: Path, layout: Layout | None = None, rank: int = 0, progress: Any = None) -> Any:
    shape = read_shape(path)
    shard = Shard.of(layout or even_layout(shape.num_layers, 1, 1), rank)
    return load_weights(path, shape, shard, Keeping(), progress)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sharded"), sharded=True)


@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint in one file, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def broken_shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# -- what is read


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("pipeline", [1, 3])
def test_the_ranks_slices_make_up_the_model(sharded: Path, tensor: int, pipeline: int) -> None:
    model = random_model()
    state = model.state_dict()
    layout = even_layout(3, tensor, pipeline)
    ranks = [load(sharded, layout, rank) for rank in range(layout.world)]
    d, kv_heads = TINY["head_dim"], TINY["num_key_value_heads"]
    for index in range(3):
        stage = next(i for i, s in enumerate(layout.stages) if s.first_layer <= index < s.end_layer)
        here = [
            r.layers[index - layout.stages[stage].first_layer] for r in ranks[stage * tensor : (stage + 1) * tensor]
        ]
        name = f"model.layers.{index}."
        q_rows = TINY["num_attention_heads"] * d // tensor
        kv_rows = max(1, kv_heads // tensor) * d
        for part, layer in enumerate(here):
            q, k, v = layer.qkv[0].split([q_rows, kv_rows, kv_rows])
            assert torch.equal(q, state[name + "self_attn.q_proj.weight"][part * q_rows :][:q_rows])
            first = part * kv_heads // tensor * d
            assert torch.equal(k, state[name + "self_attn.k_proj.weight"][first : first + kv_rows])
            assert torch.equal(v, state[name + "self_attn.v_proj.weight"][first : first + kv_rows])
            assert torch.equal(layer.input_norm, state[name + "input_layernorm.weight"])
        assert torch.equal(torch.cat([layer.o[0] for layer in here], 1), state[name + "self_attn.o_proj.weight"])
        assert torch.equal(torch.cat([layer.down[0] for layer in here], 1), state[name + "mlp.down_proj.weight"])
        gates = torch.cat([layer.gate_up[0].chunk(2)[0] for layer in here])
        assert torch.equal(gates, state[name + "mlp.gate_proj.weight"])
    vocab = TINY["vocab_size"]
    embedding = torch.cat([r.embedding[0] for r in ranks[:tensor]])
    head = torch.cat([r.head[0] for r in ranks[-tensor:]])
    assert torch.equal(embedding[:vocab], state["model.embed_tokens.weight"])
    assert torch.equal(head[:vocab], state["lm_head.weight"])
    assert not embedding[vocab:].any()
    assert not head[vocab:].any()
    assert all((r.embedding is None) == (i >= tensor) for i, r in enumerate(ranks))
    assert all((r.head is None) == (i < len(ranks) - tensor) for i, r in enumerate(ranks))


def test_a_bias_of_a_summed_linear_is_on_one_rank_only(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, attention_bias=True, mlp_bias=True)
    layout = even_layout(3, 2, 1)
    first, second = (load(path, layout, rank).layers[0] for rank in range(2))
    assert first.o[1] is not None
    assert first.down[1] is not None
    assert second.o[1] is None
    assert second.down[1] is None
    assert first.qkv[1] is not None
    assert second.qkv[1] is not None


def test_a_tied_head_is_the_embedding_itself_on_one_stage_and_read_again_on_another(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, tie_word_embeddings=True)
    alone = load(path)
    assert alone.head is alone.embedding
    layout = even_layout(3, 1, 2)
    last = load(path, layout, 1)
    assert torch.equal(last.head[0], alone.embedding[0])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_is_widened(tmp_path: Path, stored: torch.dtype) -> None:
    path = make_checkpoint(tmp_path, dtype=stored)
    head = load(path).head[0]
    assert head.dtype == torch.float32
    assert torch.equal(head, random_model(dtype=stored).lm_head.weight.float())


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 3)])
def test_progress_counts_the_ranks_own_bytes(sharded: Path, tensor: int, pipeline: int) -> None:
    layout = even_layout(3, tensor, pipeline)
    totals = []
    for rank in range(layout.world):
        calls: list[tuple[int, int]] = []
        load(sharded, layout, rank, lambda done, total, calls=calls: calls.append((done, total)))
        done = [d for d, _ in calls]
        assert done == sorted(done)
        assert done[0] == 0
        assert done[-1] == calls[-1][1]
        assert len({total for _, total in calls}) == 1
        totals.append(calls[-1][1])
    whole_size = sum(p.numel() * 4 for p in random_model().parameters())
    assert sum(totals) >= whole_size
    if layout.world == 1:
        assert totals == [whole_size]
    else:
        assert max(totals) < whole_size / 2


@pytest.mark.parametrize("dim", [0, 1])
def test_a_slice_is_what_is_counted_and_returned(whole: Path, dim: int) -> None:
    checkpoint = Checkpoint(whole)
    part = TensorSlice("model.layers.0.self_attn.o_proj.weight", (64, 64), dim, 16, 32)
    tensor = checkpoint.read(part)
    expected = random_model().state_dict()[part.name].narrow(dim, 16, 16)
    assert torch.equal(tensor, expected)
    assert checkpoint.stored_bytes(part) == 64 * 16 * 4


def test_weights_outlive_the_files(broken: Path) -> None:
    weights = load(broken)
    expected = random_model().state_dict()["lm_head.weight"]
    shutil.rmtree(broken)
    assert torch.equal(weights.head[0], expected)


def test_random_weights_have_the_shapes_of_loaded_ones(sharded: Path) -> None:
    shape = read_shape(sharded)
    layout = even_layout(3, 2, 2)
    for rank in range(4):
        shard = Shard.of(layout, rank)
        backend = CpuBackend(torch.bfloat16, 1)
        drawn, loaded = random_weights(shape, shard, backend), load_weights(sharded, shape, shard, backend)
        again = random_weights(shape, shard, backend)
        for mine, other, same in zip(drawn.layers, loaded.layers, again.layers, strict=True):
            for name in ("qkv", "o", "gate_up", "down"):
                a, b = getattr(mine, name), getattr(other, name)
                assert (a.n, a.k, a.panels.dtype) == (b.n, b.k, b.panels.dtype)
                assert torch.equal(a.panels, getattr(same, name).panels)


# -- what is refused


def test_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        Checkpoint(tmp_path)


def test_a_missing_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        read_shape(tmp_path)


def test_a_config_that_is_not_json(broken: Path) -> None:
    (broken / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        read_shape(broken)


def test_a_config_of_another_architecture(broken: Path) -> None:
    edit_json(broken / "config.json", lambda c: c.update(architectures=["MambaForCausalLM"]))
    with pytest.raises(ModelError, match="only LlamaForCausalLM is supported"):
        read_shape(broken)


def test_a_checkpoint_that_is_not_quantised_as_it_says(broken: Path) -> None:
    edit_json(broken / "config.json", lambda c: c.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .*q_proj\.weight_scale is missing"):
        load(broken)


def test_a_missing_tensor(broken: Path) -> None:
    rewrite(broken, lambda tensors: tensors.pop(LAYER))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {LAYER} is missing"):
        load(broken)


def test_a_tensor_missing_from_the_index(broken_shards: Path) -> None:
    edit_json(broken_shards / "model.safetensors.index.json", lambda index: index["weight_map"].pop(LAYER))
    with pytest.raises(CheckpointError, match=rf"index\.json: tensor {LAYER} is missing from weight_map"):
        load(broken_shards)


def test_an_index_that_names_the_wrong_file(broken_shards: Path) -> None:
    def move(index: dict[str, Any]) -> None:
        files = sorted(set(index["weight_map"].values()))
        index["weight_map"][LAYER] = next(f for f in files if f != index["weight_map"][LAYER])

    edit_json(broken_shards / "model.safetensors.index.json", move)
    with pytest.raises(CheckpointError, match=rf"model-0000\d-of-0000\d\.safetensors: tensor {LAYER} is missing"):
        load(broken_shards)


def test_an_index_that_names_a_missing_file(broken_shards: Path) -> None:
    file = next(broken_shards.glob("model-00002*"))
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json names {file.name}, which does not exist"):
        load(broken_shards)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_without_a_map(broken_shards: Path, content: str) -> None:
    (broken_shards / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map is missing or empty"):
        load(broken_shards)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", 3])
def test_an_index_that_points_out_of_the_directory(broken_shards: Path, name: object) -> None:
    edit_json(broken_shards / "model.safetensors.index.json", lambda index: index["weight_map"].update({LAYER: name}))
    with pytest.raises(CheckpointError, match=rf"weight_map gives .* for tensor {LAYER}, expected a file's name"):
        load(broken_shards)


def test_a_tensor_of_the_wrong_shape(broken: Path) -> None:
    rewrite(broken, lambda tensors: tensors.update({LAYER: torch.zeros(8, 64)}))
    match = rf"model\.safetensors: tensor {LAYER} has shape \[8, 64\], config\.json asks for \[16, 64\]"
    with pytest.raises(CheckpointError, match=match):
        load(broken)


def test_a_tensor_of_an_unexpected_dtype(broken: Path) -> None:
    rewrite(broken, lambda tensors: tensors.update({LAYER: torch.zeros((16, 64), dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=rf"{LAYER} has dtype I8, expected one of F32, BF16, F16"):
        load(broken)


@pytest.mark.parametrize("kept", [0, 4, 100, -1000, -1])
def test_a_truncated_file(broken: Path, kept: int) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt"):
        load(broken)


@pytest.mark.parametrize("head", [b"\xff" * 8, b"\x10" + b"\0" * 7 + b"not json, surely"])
def test_a_corrupt_header(broken: Path, head: bytes) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(head + file.read_bytes()[len(head) :])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt"):
        load(broken)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt"):
        weights_digest(broken)


def test_everything_is_checked_before_anything_is_read(broken: Path) -> None:
    rewrite(broken, lambda tensors: tensors.pop("lm_head.weight"))
    calls: list[int] = []
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        load(broken, progress=lambda done, total: calls.append(done))
    assert calls == []


@pytest.mark.parametrize(
    ("tensor", "overrides", "match"),
    [
        (3, {}, r"tensor 3 does not divide the model's attention heads \(8\)"),
        (8, {"intermediate_size": 100}, r"tensor 8 does not divide the model's intermediate_size \(100\)"),
        (
            2,
            {"num_key_value_heads": 3, "num_attention_heads": 6, "hidden_size": 96},
            r"tensor 2 neither divides .* KV heads \(3\)",
        ),
    ],
)
def test_a_model_that_cannot_be_split(tmp_path: Path, tensor: int, overrides: dict[str, Any], match: str) -> None:
    path = make_checkpoint(tmp_path, **overrides)
    with pytest.raises(ShardError, match=match):
        load(path, even_layout(3, tensor, 1))


def test_more_layers_than_the_model_has(whole: Path) -> None:
    with pytest.raises(ShardError, match="layers up to 4 asked for, the model has 3"):
        load(whole, even_layout(4, 1, 1))


# -- the digest


def test_the_digest_names_the_contents_not_the_place(whole: Path, broken: Path) -> None:
    assert weights_digest(broken) == weights_digest(whole)
    assert len(weights_digest(whole)) == 16
    int(weights_digest(whole), 16)


def test_the_digest_differs_for_other_weights_of_the_same_shape(whole: Path, sharded: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path, seed=1)
    assert len({weights_digest(path) for path in (whole, sharded, other)}) == 3


def test_the_digest_sees_config_and_one_tensor(whole: Path, broken: Path) -> None:
    before = weights_digest(whole)
    rewrite(broken, lambda tensors: tensors.update({LAYER: tensors[LAYER] + 1e-3}))
    changed = weights_digest(broken)
    edit_json(broken / "config.json", lambda c: c.update(rms_norm_eps=1e-6))
    assert len({before, changed, weights_digest(broken)}) == 3
