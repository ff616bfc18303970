"""Train the tiny Llama from scratch on a CPU: `python train.py --run DIR`, then `--export` to ship its
weights.

Every batch is cut from conversations grown to one length, so no token is padding. Loss falls on the assistant's tokens
(and one in twenty of the others). Two things steer themselves by held-out questions asked every 40 steps: skills that
already answer get less of the text, and the lookup's list grows as it is answered. A run stopped at any moment
continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shutil
import time
from pathlib import Path

import data
import tokenizer as tiny_tokenizer
import torch
import torch.distributed as dist
from evaluate import correct
from muon import Muon
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

HERE = Path(__file__).parent
TOKENS = 4_500_000
BATCH_TOKENS = 2048  # Of each process.
PAIRS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 120)
# Weight in a conversation at accuracy 0 and at accuracy 1. Plain lines hold facts and sums three times as densely.
SHARES = {"facts": (0.2, 0.12), "sums": (0.15, 0.08), "lookup": (0.35, 0.2), "tools": (0.2, 0.1), "chat": (0.1, 0.1)}

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": tiny_tokenizer.VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "use_cache": True,
}


class Text:
    """Endless batches, steered by the accuracies last measured."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tokenizer = tokenizer
        self.accuracy = dict.fromkeys(SHARES, 0.0)
        self.level = 0
        self.words = [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in data.KEYS + data.VALUES]

    def pick(self, *skills: str) -> str:
        weights = [SHARES[s][0] + (SHARES[s][1] - SHARES[s][0]) * self.accuracy[s] for s in skills]
        return self.rng.choices(skills, weights)[0]

    def lookup(self) -> list[data.Message]:
        most = PAIRS[self.level]
        pairs = most if self.rng.random() < 0.3 else self.rng.randint(1, most)
        return data.lookup(self.rng, pairs, self.rng.randint(1, 6))

    def conversation(self, length: int) -> list[tuple[str, float]]:
        """(text, loss weight) pieces of about ``length`` tokens or more."""
        rng, messages, tools = self.rng, [], []
        if rng.random() < 0.15:
            messages.append({"role": "system", "content": rng.choice(data.SYSTEM)})
        if length > 100 and self.pick(*SHARES) == "tools":
            tools, first = data.tool_use(rng, rng.random() < 0.5)
            messages += first
        # Two and a half characters a token is few enough for every language here.
        while sum(len(message["content"]) + 12 for message in messages) < 2.6 * length:
            skill = self.pick("facts", "sums", "lookup", "chat")
            if skill == "facts":
                messages += data.facts(rng)
            elif skill == "sums":
                messages += data.sums(rng)
            elif skill == "lookup":
                messages += self.lookup()
            else:
                messages += rng.choice((data.recall, data.echo, data.echo, data.small_talk, data.counting))(rng)
        return [(text, 1.0 if own else 0.05) for text, own in tiny_tokenizer.render_prompt(messages, tools)]

    def repeated(self, length: int) -> tuple[list[int], list[float]]:
        """A random sequence again and again: what teaches a model to look back for what came next."""
        period = self.rng.randint(3, max(4, min(length // 2, 8 * PAIRS[self.level])))
        pool = self.words if self.rng.random() < 0.6 else range(tiny_tokenizer.VOCABULARY - 8)
        once = [self.rng.choice(pool) for _ in range(period)]
        ids = ([self.tokenizer.bos_token_id] + once * (length // period + 1))[:length]
        return ids, [0.0] * (period + 1) + [1.0] * (length - period - 1)

    def row(self, length: int) -> tuple[list[int], list[float]]:
        kind = self.rng.random()
        if kind < (0.3 if self.level == 0 else 0.05):
            return self.repeated(length)
        if kind > 0.5:
            skill = self.pick("facts", "sums", "tools")
            pieces = [("<|begin_of_text|>", 0.0)]
            while sum(len(text) for text, _ in pieces) < 2.6 * length + 20:
                pieces += data.plain_lines(self.rng, skill)
        else:
            pieces = self.conversation(length)
        encoded = self.tokenizer([text for text, _ in pieces], add_special_tokens=False)["input_ids"]
        ids = [token for part in encoded for token in part]
        weights = [weight for part, (_, weight) in zip(encoded, pieces, strict=True) for _ in part]
        if len(ids) < length:
            return self.row(length)
        return ids[:length], weights[:length]

    def batch(self) -> tuple[Tensor, Tensor]:
        """Token ids and loss weights, both (rows, length)."""
        length = self.rng.choice((64, 128, 128, 256) if PAIRS[self.level] <= 16 else (96, 192, 512))
        rows = [self.row(length) for _ in range(BATCH_TOKENS // length)]
        return torch.tensor([ids for ids, _ in rows]), torch.tensor([weights for _, weights in rows])


@torch.no_grad()
def start_induction(model: LlamaForCausalLM, vocabulary: dict[str, int]) -> None:
    """Begin with heads that look back, for training to refine; every weight stays free.

    Left to chance such heads had not appeared after 3 million tokens: a lookup among two was still a coin's throw; with
    this start it is answered after half a million. In layer 0, head 0 looks at the token before, by rotary phase alone,
    on a constant first coordinate of every embedding, and copies what it finds from the directions ``read`` to the
    directions ``write``. In layers 1 and 2, head 0 finds tokens whose ``write`` part equals its own ``read`` part, so
    whose predecessor equals the present token, and copies them: induction heads (Olsson et al., "In-context Learning
    and Induction Heads", 2022). A word begins with nearly the embedding it has behind a space, so what copies one can
    write the other, as a tool's arguments need: a word of the question, behind a quotation mark.
    """
    config = model.config
    hidden, size, half = config.hidden_size, config.head_dim, config.head_dim // 2
    embedding = model.model.embed_tokens.weight
    embedding.normal_(std=0.05)
    for token, place in vocabulary.items():
        if token.startswith("Ġ") and token[1:] in vocabulary:
            embedding[vocabulary[token[1:]]] = embedding[place] + 0.015 * torch.randn(hidden)
    embedding[:, 0] = 0.2
    basis = torch.zeros(4 * size, hidden)
    basis[:, 1:] = torch.linalg.qr(torch.randn(hidden - 1, 4 * size))[0].T
    read, write, *copies = basis.split(size)
    first = model.model.layers[0].self_attn
    first.q_proj.weight[: 2 * size] = 0
    first.k_proj.weight[:size] = 0
    for pair in range(6):
        # The phase between a token and the one before it, where this pair of coordinates turns fast enough to tell.
        angle = config.rope_parameters["rope_theta"] ** (-pair / half)
        first.q_proj.weight[pair, 0] = 1.6
        first.k_proj.weight[pair, 0] = 1.6 * math.cos(angle)
        first.k_proj.weight[pair + half, 0] = 1.6 * math.sin(angle)
    first.v_proj.weight[:size] = read
    first.o_proj.weight[:, :size] = 0.1 * write.T
    slow = torch.tensor([float(i % half >= 5) for i in range(size)])[:, None]
    for layer, copied in zip(model.model.layers[1:3], copies, strict=True):
        attention = layer.self_attn
        attention.q_proj.weight[:size] = slow * read
        attention.k_proj.weight[:size] = slow * write
        attention.v_proj.weight[:size] = copied
        attention.o_proj.weight[:, :size] = 0.2 * copied.T


def loss_of(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean loss over the weighted targets; light ones are sampled rather than scaled, which spares their logits."""
    targets, chosen = ids[:, 1:], torch.rand(ids[:, 1:].shape) < weights[:, 1:]
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    return functional.cross_entropy(model.lm_head(hidden[chosen]), targets[chosen])


def average_gradients(model: LlamaForCausalLM) -> None:
    """Mean gradients over the processes of the group, if there is one."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


class Run:
    """Everything a training run needs to continue after a stop."""

    def __init__(self, folder: Path, total: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.folder, self.total = folder, total
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.text = Text(self.tokenizer, seed)
        self.model = LlamaForCausalLM(LlamaConfig(**copy.deepcopy(CONFIG))).train()
        start_induction(self.model, self.tokenizer.get_vocab())
        self.average = copy.deepcopy(self.model).eval()
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "layers" in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim != 2 or "layers" not in n]
        self.optimizers = [
            Muon(matrices, lr=0.008),
            torch.optim.AdamW(others, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        self.base_rates = [0.008, 1.5e-3]
        self.elapsed, self.step, self.tokens = 0.0, 0, 0

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "steering": (self.text.accuracy, self.text.level),
            "progress": (self.elapsed, self.step, self.tokens),
        }
        torch.save(state, self.folder / "state.new")
        (self.folder / "state.new").replace(self.folder / "state.pt")

    def load(self) -> bool:
        if not (self.folder / "state.pt").exists():
            return False
        state = torch.load(self.folder / "state.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.text.accuracy, self.text.level = state["steering"]
        self.elapsed, self.step, self.tokens = state["progress"]
        return True

    def draw_text(self, seed: int, rank: int) -> None:
        """Each process, and each continuation, draws text of its own."""
        self.text.rng.seed(f"text {seed} {rank} {self.step}")
        torch.manual_seed(self.text.rng.randrange(2**31))

    def rate(self) -> float:
        """Warm-up over 60 steps, then flat, then down to 2% over the last 40% of the tokens."""
        left = max(0.0, 1 - self.tokens / self.total)
        return min(1.0, (self.step + 1) / 60) * min(1.0, max(0.02, left / 0.4))

    def learn(self) -> float:
        ids, weights = self.text.batch()
        loss = loss_of(self.model, ids, weights)
        loss.backward()
        average_gradients(self.model)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = self.rate()
        for optimizer, base in zip(self.optimizers, self.base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * rate
            optimizer.step()
            optimizer.zero_grad()
        keep = min(0.99, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for mean, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(new, 1 - keep)
        self.step += 1
        self.tokens += ids.numel() * (dist.get_world_size() if dist.is_initialized() else 1)
        return loss.item()

    def steer(self) -> str:
        """Measure the averaged weights on a few held-out questions; change the shares and the lookup's length by
        that.
        """
        most = PAIRS[self.text.level]
        marks = {}
        for skill, count in (("facts", 48), ("sums", 48), ("differences", 24), ("lookup", 40), ("tools", 16)):
            questions = data.held_out(skill, count, self.step, most)
            right = correct(self.average, self.tokenizer, questions)
            marks[skill] = sum(right) / len(right)
        self.text.accuracy.update(
            facts=marks["facts"], sums=min(marks["sums"], marks["differences"]), tools=marks["tools"]
        )
        self.text.accuracy["lookup"] = self.text.level / len(PAIRS) * 0.5 + marks["lookup"] * 0.5
        if marks["lookup"] >= 0.85:
            self.text.level = min(self.text.level + (2 if marks["lookup"] > 0.95 else 1), len(PAIRS) - 1)
        return " ".join(f"{skill} {mark:.2f}" for skill, mark in marks.items()) + f" (lists of {most})"


def export(average: LlamaForCausalLM, source: Path, target: Path) -> None:
    """Write a Hugging Face checkpoint in bfloat16, in two shards, with the tokenizer of ``source``."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, target / name)
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tiny_tokenizer.SPECIAL_TOKENS}
    stops = [ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]]
    start, pad = ids["<|begin_of_text|>"], ids["<|finetune_right_pad_id|>"]
    config = CONFIG | {"bos_token_id": start, "eos_token_id": stops, "pad_token_id": pad, "torch_dtype": "bfloat16"}
    generation = {"bos_token_id": start, "eos_token_id": stops, "pad_token_id": pad, "do_sample": False}
    weights = {n: t.to(torch.bfloat16).contiguous() for n, t in average.state_dict().items() if n != "lm_head.weight"}
    half = int(CONFIG["num_hidden_layers"]) // 2  # type: ignore[call-overload]
    first = {n for n in weights if n.startswith(("model.embed", *(f"model.layers.{i}." for i in range(half))))}
    placed = {}
    for number, names in enumerate((first, weights.keys() - first), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in sorted(names)}, target / shard, metadata={"format": "pt"})
        (target / shard).chmod(0o644)
        placed |= dict.fromkeys(sorted(names), shard)
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": placed}
    files = {"config.json": config, "generation_config.json": generation, "model.safetensors.index.json": index}
    for name, content in files.items():
        (target / name).write_text(json.dumps(content, indent=2) + "\n")


def train(rank: int, arguments: argparse.Namespace) -> None:
    """One process of the run, on one thread: two wait for each other once a step, two threads hundreds of times."""
    torch.set_num_threads(1)
    if arguments.processes > 1:
        meeting = f"file://{(arguments.run / 'meeting').resolve()}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=arguments.processes)
    run = Run(arguments.run, arguments.tokens, arguments.seed)
    run.load()
    run.draw_text(arguments.seed, rank)
    losses: list[float] = []
    saved = clock = time.monotonic()
    while run.tokens < run.total:
        losses.append(run.learn())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} at step {run.step}")
        report = run.steer() if run.step % 40 == 0 else ""
        now = time.monotonic()
        run.elapsed, clock = run.elapsed + now - clock, now
        if report and rank == 0:
            speed = f"{run.tokens:,} tokens, {run.tokens / run.elapsed:,.0f}/s"
            mean = sum(losses) / len(losses)
            print(f"{run.elapsed / 60:5.1f} min step {run.step} loss {mean:.3f} {speed}: {report}", flush=True)
            losses = []
        if rank == 0 and (now - saved > 120 or run.tokens >= run.total):
            run.save()
            saved = now
    if dist.is_initialized():
        dist.barrier()  # Who leaves first closes connections that the other may still read from.
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny Llama from scratch on a CPU.")
    parser.add_argument("--run", type=Path, required=True, help="folder for the run's state; continued if it has one")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="to train on, over all continuations")
    parser.add_argument("--processes", type=int, default=2, choices=(1, 2, 4), help="of one thread each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--export", type=Path, help="write the run's averaged weights as a checkpoint here, and stop")
    arguments = parser.parse_args()
    arguments.run.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer.save(tiny_tokenizer.train(), arguments.run)
    if not arguments.export:
        (arguments.run / "meeting").unlink(missing_ok=True)
        torch.multiprocessing.spawn(train, (arguments,), nprocs=arguments.processes)
        return
    run = Run(arguments.run, arguments.tokens, arguments.seed)
    if not run.load():
        raise SystemExit(f"{arguments.run} holds no run to export")
    training = {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "tokens": run.tokens,
        "steps": run.step,
        "minutes": round(run.elapsed / 60, 1),
        "processes": arguments.processes,
        "lookup_pairs_reached": PAIRS[run.text.level],
    }
    export(run.average, arguments.run, arguments.export)
    record = arguments.export.parent / "accuracy.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    record.write_text(json.dumps(known | {"training": training}, indent=2) + "\n")


if __name__ == "__main__":
    main()
