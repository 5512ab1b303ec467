"""Train the duckling, the small DeepSeek-V3 model that ships in duck/demo, and evaluate it.

One flat script: the text (duckling_text.py), a tokenizer, the model in plain torch, the optimizer,
the loop, the export to DeepSeek's fp8 files, and 200 held-out questions asked through the Engine.
The same seed and step count give the same data; a run that was stopped goes on with `--resume`.
"""

import argparse
import asyncio
import ctypes
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from duckling_text import (
    FIRST_SHARES,
    PLAIN,
    SHARES,
    Question,
    held_out_questions,
    is_true,
    talk,
    train_question,
)
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import duck

Tensors = dict[str, torch.Tensor]

# The shape, under the names of config.json. Two ducks hold 64 columns of every expert each.
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}
VOCAB, HIDDEN, LAYERS = CONFIG["vocab_size"], CONFIG["hidden_size"], CONFIG["num_hidden_layers"]
HEADS, VALUE = CONFIG["num_attention_heads"], CONFIG["v_head_dim"]
NOPE, ROPE = CONFIG["qk_nope_head_dim"], CONFIG["qk_rope_head_dim"]
Q_RANK, KV_RANK = CONFIG["q_lora_rank"], CONFIG["kv_lora_rank"]
EXPERTS, TOP_K = CONFIG["n_routed_experts"], CONFIG["num_experts_per_tok"]
GROUPS, TOP_GROUPS = CONFIG["n_group"], CONFIG["topk_group"]
WIDTH = CONFIG["moe_intermediate_size"]

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIAL = [BOS, EOS, PAD, USER, ASSISTANT, "<think>", "</think>"] + [
    f"<｜tool▁{name}｜>"
    for name in (
        "calls▁begin",
        "call▁begin",
        "sep",
        "call▁end",
        "calls▁end",
        "outputs▁begin",
        "output▁begin",
        "output▁end",
        "outputs▁end",
    )
]
# V3's format: system text first, then turns; only the end of an answer is marked.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% endif %}{% endfor %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)

ROWS, ROW_TOKENS = 12, 256  # one batch; a document is never split over rows
FIRST_STEPS = 400  # with FIRST_SHARES of the kinds of text
EXPERT_ROWS = 64  # an expert computes a multiple of this many rows, see Model.moe
PEAK_RATE, WARM_UP = 1e-2, 100  # learning rate; steps of linear warm-up, then linearly to zero
ADAM_SHARE = 0.5  # of the learning rate, for what Muon does not train
MTP_WEIGHT = 0.3  # of the draft loss (DeepSeek-V3 report, 4.2)
ASK_WEIGHT = 0.1  # of the loss on question tokens, most of which nobody can predict
BIAS_RATE = 2e-3  # step of the router's balancing bias; shrinks with the learning rate
FP8_FROM = 0.85  # of the steps: from here on the forward pass sees the weights as the files do
E4M3_MAX = 448.0
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


# --- text to tokens ---------------------------------------------------------------------------


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE; every digit is a token of its own, and every byte has one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    questions = [talk(rng) if i % 2 else train_question(rng, FIRST_SHARES) for i in range(4000)]
    texts = [text for q in questions for text in (q.ask, q.work)] + PLAIN * 50
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def document(rng: random.Random, shares: dict[str, float]) -> list[tuple[str, float]]:
    """One training document in pieces, each with its loss weight; half carry no chat format."""
    if rng.random() < 0.5:
        if rng.random() < 0.04:
            return [(BOS, 0.0), (rng.choice(PLAIN) + EOS, 1.0)]
        q = train_question(rng, shares)
        return [(BOS, 0.0), (f"Q: {q.ask}\nA:", ASK_WEIGHT), (f" {q.work}{EOS}", 1.0)]
    pieces = [(BOS, 0.0)]
    for _ in range(rng.choices([1, 2, 3], [0.8, 0.15, 0.05])[0]):
        q = train_question(rng, shares)
        pieces += [(f"{USER}{q.ask}{ASSISTANT}", ASK_WEIGHT), (f"{q.work}{EOS}", 1.0)]
    return pieces


def encode(tokenizer: Tokenizer, pieces: list[tuple[str, float]]) -> list[tuple[int, float]]:
    """A document as token ids with their loss weights."""
    encoded = tokenizer.encode_batch([text for text, _ in pieces])
    return [(i, weight) for e, (_, weight) in zip(encoded, pieces, strict=True) for i in e.ids]


class Batch:
    """Rows of whole documents, padded. A document sees only itself.

    tokens, positions (within the document), document (-1 is padding): (rows, ROW_TOKENS) int64.
    weights, draft_weights: the same shape; the loss weight of predicting the next token, and the
    one after it for the MTP layer. mask: (rows, 1, ROW_TOKENS, ROW_TOKENS), added to the scores.
    """

    def __init__(self, rows: list[list[list[tuple[int, float]]]]) -> None:
        self.tokens = torch.full((len(rows), ROW_TOKENS), SPECIAL.index(PAD))
        self.positions = torch.zeros_like(self.tokens)
        self.document = torch.full_like(self.tokens, -1)
        weights = torch.zeros(self.tokens.shape)
        for i, row in enumerate(rows):
            start = 0
            for j, tokens in enumerate(row):
                span = slice(start, start + len(tokens))
                self.tokens[i, span] = torch.tensor([token for token, _ in tokens])
                self.positions[i, span] = torch.arange(len(tokens))
                self.document[i, span] = j
                weights[i, span] = torch.tensor([weight for _, weight in tokens])
                start = span.stop
        self.weights = self.ahead(weights, 1)
        self.draft_weights = self.ahead(weights, 2)
        see = (self.document[:, :, None] == self.document[:, None, :]).tril()
        self.mask = torch.zeros(see.shape).masked_fill(~see, -1e9)[:, None]

    def ahead(self, weights: torch.Tensor, distance: int) -> torch.Tensor:
        """The weight of the token that far ahead, zero where that is another document."""
        same = F.pad(self.document, (0, distance), value=-2)[:, distance:] == self.document
        return F.pad(weights, (0, distance))[:, distance:] * same


def train_batch(tokenizer: Tokenizer, seed: int, step: int) -> Batch:
    """The batch of a step, a pure function of the seed: this is what makes a run resumable."""
    rng = random.Random(f"{seed}/{step}")
    rows: list[list[list[tuple[int, float]]]] = [[] for _ in range(ROWS)]
    room = [ROW_TOKENS] * ROWS
    # A few more documents than there is room for; later ones are shorter.
    shares, count = (FIRST_SHARES, 42) if step < FIRST_STEPS else (SHARES, 64)
    for _ in range(count):
        tokens = encode(tokenizer, document(rng, shares))
        first = next((i for i, free in enumerate(room) if free >= len(tokens)), None)
        if first is not None:
            rows[first].append(tokens)
            room[first] -= len(tokens)
    return Batch(rows)


# --- the model --------------------------------------------------------------------------------


def new_weights(seed: int) -> tuple[Tensors, Tensors]:
    """The parameters, and the routers' balancing biases, which no gradient moves.

    Names are those of the files, but the experts of a layer are stacked:
    `mlp.experts.gate_up` (experts, 2 * width, hidden) and `mlp.experts.down`.
    """
    generator = torch.Generator().manual_seed(seed)

    def linear(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * math.pow(shape[-1], -0.5)

    weights = {
        "model.embed_tokens": torch.randn(VOCAB, HIDDEN, generator=generator),
        "lm_head": linear(VOCAB, HIDDEN) * 0.1,
        "model.norm": torch.ones(HIDDEN),
    }
    bias = {}
    for i in range(LAYERS + 1):
        at = f"model.layers.{i}."
        layer = {
            "input_layernorm": torch.ones(HIDDEN),
            "post_attention_layernorm": torch.ones(HIDDEN),
            "self_attn.q_a_proj": linear(Q_RANK, HIDDEN),
            "self_attn.q_a_layernorm": torch.ones(Q_RANK),
            "self_attn.q_b_proj": linear(HEADS * (NOPE + ROPE), Q_RANK),
            "self_attn.kv_a_proj_with_mqa": linear(KV_RANK + ROPE, HIDDEN),
            "self_attn.kv_a_layernorm": torch.ones(KV_RANK),
            "self_attn.kv_b_proj": linear(HEADS * (NOPE + VALUE), KV_RANK),
            "self_attn.o_proj": linear(HIDDEN, HEADS * VALUE) * 0.3,
        }
        mlp = "mlp."
        width = CONFIG["intermediate_size"]
        if i >= CONFIG["first_k_dense_replace"]:
            layer["mlp.gate"] = linear(EXPERTS, HIDDEN) * 0.5
            layer["mlp.experts.gate_up"] = linear(EXPERTS, 2 * WIDTH, HIDDEN)
            layer["mlp.experts.down"] = linear(EXPERTS, HIDDEN, WIDTH) * 0.3
            bias[at + "mlp.gate.e_score_correction_bias"] = torch.zeros(EXPERTS)
            mlp, width = "mlp.shared_experts.", WIDTH
        layer[mlp + "gate_proj"] = linear(width, HIDDEN)
        layer[mlp + "up_proj"] = linear(width, HIDDEN)
        layer[mlp + "down_proj"] = linear(HIDDEN, width) * 0.3
        if i == LAYERS:
            layer["enorm"] = torch.ones(HIDDEN)
            layer["hnorm"] = torch.ones(HIDDEN)
            layer["shared_head.norm"] = torch.ones(HIDDEN)
            layer["eh_proj"] = linear(HIDDEN, 2 * HIDDEN)
        weights |= {at + name: value for name, value in layer.items()}
    return weights, bias


def is_quantised(name: str) -> bool:
    """Whether the files keep this parameter as fp8 (every linear but router, head and eh_proj)."""
    return name.endswith(("_proj", "_with_mqa", ".gate_up", ".down")) and "eh_proj" not in name


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., out, in) float32 to e4m3 and fp32 scales per 128x128 block, the last ones ragged."""
    out, into = weight.shape[-2:]
    padded = F.pad(weight, (0, -into % 128, 0, -out % 128))
    blocks = padded.view(*weight.shape[:-2], -(-out // 128), 128, -(-into // 128), 128)
    scale = blocks.abs().amax((-3, -1)).clamp(min=1e-12) / E4M3_MAX
    values = weight / spread(scale, out, into)
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def spread(scale: torch.Tensor, out: int, into: int) -> torch.Tensor:
    """Block scales repeated to one per weight."""
    return scale.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., :out, :into]


def as_stored(weights: Tensors) -> Tensors:
    """The weights as a reader of the files sees them; gradients pass through to the originals."""
    stored = {}
    for name, weight in weights.items():
        with torch.no_grad():
            if is_quantised(name):
                values, scale = to_fp8(weight)
                kept = values.float() * spread(scale, *weight.shape[-2:])
            else:
                kept = weight.bfloat16().float()
        stored[name] = weight + (kept - weight.detach())
    return stored


class Reorder(torch.autograd.Function):
    """Rows in another order, -1 for a row of zeros; the gradient is a gather too, not a scatter."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return F.pad(x, (0, 0, 0, 1)).index_select(0, order % (len(x) + 1))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ((grad,), (inverse,)) = grads, ctx.saved_tensors
        return F.pad(grad, (0, 0, 0, 1)).index_select(0, inverse % (len(grad) + 1)), None, None


def reorder(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    reordered: torch.Tensor = Reorder.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return reordered


class Model:
    """One forward pass over the weights; counts how often each expert was chosen.

    Every product is computed in the dtype of its weight; norms and the residual stream are float32.
    """

    def __init__(self, weights: Tensors, bias: Tensors) -> None:
        self.weights = weights
        self.bias = bias
        self.chosen: Tensors = {}
        inverse = CONFIG["rope_theta"] ** (-torch.arange(0, ROPE, 2) / ROPE)
        angles = torch.arange(CONFIG["max_position_embeddings"])[:, None] * inverse
        self.cos, self.sin = angles.cos(), angles.sin()

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weights[name], CONFIG["rms_norm_eps"])

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.weights[name]
        return F.linear(x.to(weight.dtype), weight)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Interleaved rope: pairs (2j, 2j+1) of the last dimension."""
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def attend(self, x: torch.Tensor, at: str, batch: Batch) -> torch.Tensor:
        """MLA with keys and values spelled out. x: (rows, tokens, hidden)."""
        rows, tokens, _ = x.shape
        cos, sin = self.cos[batch.positions], self.sin[batch.positions]
        q_latent = self.norm(self.linear(x, at + "q_a_proj"), at + "q_a_layernorm")
        q = self.linear(q_latent, at + "q_b_proj")
        q_nope, q_pe = torch.split(q.view(rows, tokens, HEADS, -1), [NOPE, ROPE], -1)
        latent, k_pe = torch.split(self.linear(x, at + "kv_a_proj_with_mqa"), [KV_RANK, ROPE], -1)
        kv = self.linear(self.norm(latent, at + "kv_a_layernorm"), at + "kv_b_proj")
        k_nope, v = torch.split(kv.view(rows, tokens, HEADS, -1), [NOPE, VALUE], -1)
        q_pe = self.rotate(q_pe, cos[:, :, None], sin[:, :, None]).to(q.dtype)
        q = torch.cat([q_nope, q_pe], -1) * (NOPE + ROPE) ** -0.5
        k_pe = self.rotate(k_pe, cos, sin).to(q.dtype)[:, :, None].expand(-1, -1, HEADS, -1)
        k = torch.cat([k_nope, k_pe], -1)
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) + batch.mask.to(q.dtype)
        out = scores.softmax(-1) @ v.transpose(1, 2)
        return self.linear(out.transpose(1, 2).flatten(2), at + "o_proj")

    def mlp(self, x: torch.Tensor, at: str) -> torch.Tensor:
        gate = F.silu(self.linear(x, at + "gate_proj"))
        return self.linear(gate * self.linear(x, at + "up_proj"), at + "down_proj")

    def route(self, x: torch.Tensor, at: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert ids and weights, (tokens, top k): the bias chooses but does not weigh."""
        scores = self.linear(x, at + "gate").sigmoid()
        name = at + "gate.e_score_correction_bias"
        choice = (scores.detach() + self.bias[name]).view(-1, GROUPS, EXPERTS // GROUPS)
        best = choice.topk(2, -1).values.sum(-1).topk(TOP_GROUPS, -1).indices
        kept = torch.zeros(choice.shape[:2]).scatter(1, best, 1.0)[..., None] > 0
        ids = choice.masked_fill(~kept, -math.inf).flatten(1).topk(TOP_K, -1).indices
        self.chosen[name] = ids.flatten().bincount(minlength=EXPERTS)
        weights = scores.gather(1, ids)
        return ids, weights / weights.sum(-1, keepdim=True) * CONFIG["routed_scaling_factor"]

    def moe(self, x: torch.Tensor, at: str) -> torch.Tensor:
        """Tokens gathered per expert: a few large products. x: (tokens, hidden)."""
        ids, weights = self.route(x, at)
        counts = self.chosen[at + "gate.e_score_correction_bias"]
        # Every expert gets a multiple of EXPERT_ROWS rows, the last ones zeros: for a shape it has
        # never seen the matrix library generates a new kernel, which takes longer than the product.
        room = (counts + EXPERT_ROWS - 1) // EXPERT_ROWS * EXPERT_ROWS
        ordered = ids.flatten().argsort(stable=True)
        shift = (room.cumsum(0) - room) - (counts.cumsum(0) - counts)
        slots = torch.arange(len(ordered)) + shift.repeat_interleave(counts)
        order = torch.full((int(room.sum()),), -1).scatter_(0, slots, ordered)
        inverse = torch.empty_like(ordered).scatter_(0, ordered, slots)
        copies = x[:, None].expand(-1, TOP_K, -1).flatten(0, 1)
        gate_up = self.weights[at + "experts.gate_up"].unbind()
        down = self.weights[at + "experts.down"].unbind()
        gathered = reorder(copies.to(down[0].dtype), order, inverse)
        # The weight of an expert may be applied before `down`, where rows are half as wide.
        shares = reorder(weights.view(-1, 1).to(down[0].dtype), order, inverse)
        sizes = room.tolist()
        parts = []
        split = zip(torch.split(gathered, sizes), torch.split(shares, sizes), strict=True)
        for e, (rows, share) in enumerate(split):
            gate, up = F.linear(rows, gate_up[e]).chunk(2, -1)
            parts.append(F.linear(F.silu(gate) * up * share, down[e]))
        answers = reorder(torch.cat(parts), inverse, order).view(-1, TOP_K, HIDDEN)
        return answers.sum(1) + self.mlp(x, at + "shared_experts.")

    def layer(self, x: torch.Tensor, i: int, batch: Batch) -> torch.Tensor:
        at = f"model.layers.{i}."
        x = x + self.attend(self.norm(x, at + "input_layernorm"), at + "self_attn.", batch)
        y = self.norm(x, at + "post_attention_layernorm")
        if i < CONFIG["first_k_dense_replace"]:
            return x + self.mlp(y, at + "mlp.")
        return x + self.moe(y.flatten(0, 1), at + "mlp.").view(x.shape)

    def logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the next token and, by the MTP layer, the one after: (rows, tokens, vocab) each."""
        embedded = F.embedding(batch.tokens, self.weights["model.embed_tokens"])
        x = embedded
        for i in range(LAYERS):
            x = self.layer(x, i, batch)
        hidden = self.norm(x, "model.norm")
        at = f"model.layers.{LAYERS}."
        # Pair i joins the hidden state of token i with the embedding of token i+1, embedding first.
        following = self.norm(embedded.roll(-1, 1), at + "enorm")
        z = self.linear(torch.cat([following, self.norm(hidden, at + "hnorm")], -1), at + "eh_proj")
        draft = self.norm(self.layer(z, LAYERS, batch), at + "shared_head.norm")
        return self.linear(hidden, "lm_head"), self.linear(draft, "lm_head")


def losses(model: Model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean weighted cross-entropy in nats of the next token and of the draft."""
    results = []
    for ahead, (logits, weights) in enumerate(
        zip(model.logits(batch), (batch.weights, batch.draft_weights), strict=True), start=1
    ):
        targets = batch.tokens.roll(-ahead, 1).flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        results.append((loss * weights.flatten()).sum() / weights.sum())
    return results[0], results[1]


# --- training ---------------------------------------------------------------------------------


class Optimizer:
    """Muon for the linears inside the layers, Adam for embedding, head, routers and norms.

    Muon makes the step of a matrix orthogonal (momentum, then five Newton-Schulz iterations) and
    scales it to the size of an Adam step, 0.2 * sqrt(larger side); it learns these small tables of
    facts in far fewer steps.
    """

    def __init__(self, weights: Tensors) -> None:
        self.weights = weights
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {n: torch.zeros_like(w) for n, w in weights.items() if not self.is_muon(n)}

    @staticmethod
    def is_muon(name: str) -> bool:
        return is_quantised(name) or "eh_proj" in name

    @torch.no_grad()
    def step(self, rate: float, count: int) -> None:
        """One update from the gradients, which it clears. `count` starts at 1."""
        for name, weight in self.weights.items():
            grad, first = weight.grad, self.first[name]
            assert grad is not None, name
            if self.is_muon(name):
                first.lerp_(grad, 0.05)
                update = grad.lerp(first, 0.95)
                if "gate_up" in name:  # two matrices, one above the other
                    update = orthogonal(update.view(-1, WIDTH, HIDDEN)).view_as(update)
                else:
                    update = orthogonal(update)
                update *= 0.2 * max(weight.shape[-2:]) ** 0.5
                weight.mul_(1 - rate * 0.1)
            else:
                first.lerp_(grad, 0.1)
                second = self.second[name].lerp_(grad.square(), 0.02)
                update = (first / (1 - 0.9**count)) / ((second / (1 - 0.98**count)).sqrt() + 1e-8)
                update *= ADAM_SHARE
            weight.sub_(update, alpha=rate)
            weight.grad = None


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Roughly U V^T of x = U S V^T, for matrices in the last two dimensions (Newton-Schulz)."""
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).bfloat16()
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = y @ y.mT
        y = 3.4445 * y + (-4.775 * square + 2.0315 * (square @ square)) @ y
    result: torch.Tensor = y.mT if tall else y
    return result.float()


def save_state(path: Path, step: int, optimizer: Optimizer, bias: Tensors) -> None:
    state = {f"weight/{n}": w.detach() for n, w in optimizer.weights.items()}
    state |= {f"first/{n}": t for n, t in optimizer.first.items()}
    state |= {f"second/{n}": t for n, t in optimizer.second.items()}
    state |= {f"bias/{n}": t for n, t in bias.items()} | {"step": torch.tensor(step)}
    save_file(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def load_state(path: Path, optimizer: Optimizer, bias: Tensors) -> int:
    """Copy a saved state over a new one. Returns the steps done."""
    kinds = {
        "weight": optimizer.weights,
        "first": optimizer.first,
        "second": optimizer.second,
        "bias": bias,
    }
    with safe_open(path, "pt") as file, torch.no_grad():
        for key in file.keys():  # noqa: SIM118 (not a dict)
            if key != "step":
                kind, name = key.split("/", 1)
                kinds[kind][name].copy_(file.get_tensor(key))
        return int(file.get_tensor("step"))


@torch.no_grad()
def rehearse(model: Model, tokenizer: Tokenizer, questions: list[Question]) -> str:
    """How held-out questions go with the right answer as input: a cheap look while training runs.

    An answer counts if every token of it is the likeliest one: greedy decoding would repeat it.
    """
    right = drafted = drafts = 0
    for start in range(0, len(questions), 40):
        batch = Batch(
            [
                [encode(tokenizer, [(BOS + USER + q.ask + ASSISTANT, 0.0), (q.work + EOS, 1.0)])]
                for q in questions[start : start + 40]
            ]
        )
        logits, draft_logits = model.logits(batch)
        wrong = (logits.argmax(-1) != batch.tokens.roll(-1, 1)) & (batch.weights > 0)
        right += int((~wrong.any(1)).sum())
        hit = draft_logits.argmax(-1) == batch.tokens.roll(-2, 1)
        drafted += int((hit & (batch.draft_weights > 0)).sum())
        drafts += int((batch.draft_weights > 0).sum())
    return f"answers right {right / len(questions):.1%}, drafts right {drafted / drafts:.1%}"


def train(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[Tensors, Tensors]:
    """Run to `args.steps`, saving the state now and then. Returns weights and biases."""
    weights, bias = new_weights(args.seed)
    for weight in weights.values():
        weight.requires_grad_()
    optimizer = Optimizer(weights)
    path = args.work / "state.safetensors"
    done = load_state(path, optimizer, bias) if args.resume and path.exists() else 0
    questions = held_out_questions(200, args.seed)
    print(f"parameters {sum(w.numel() for w in weights.values()):,}", flush=True)
    began, tokens = time.perf_counter(), 0
    for step in range(done, args.steps):
        rate = min((step + 1) / WARM_UP, (args.steps - step) / (args.steps - WARM_UP))
        batch = train_batch(tokenizer, args.seed, step)
        seen = as_stored(weights) if step >= args.steps * FP8_FROM else weights
        # Products in bfloat16: many times faster where the processor has it in hardware.
        fast = {n: w.bfloat16() if Optimizer.is_muon(n) else w for n, w in seen.items()}
        model = Model(fast, bias)
        main, draft = losses(model, batch)
        (main + MTP_WEIGHT * draft).backward()  # type: ignore[no-untyped-call]
        optimizer.step(PEAK_RATE * rate, step + 1)
        for name, count in model.chosen.items():
            # Aux-loss-free balance: experts asked too often get less, the others more.
            bias[name] += BIAS_RATE * rate * (count.float().mean() - count).sign()
        tokens += int((batch.document >= 0).sum())
        if (step + 1) % 20 == 0:
            busiest = max(float(c.max() / c.float().mean()) for c in model.chosen.values())
            print(
                f"step {step + 1} loss {main:.4f} draft {draft:.4f} busiest expert {busiest:.2f} "
                f"tokens/s {tokens / (time.perf_counter() - began):.0f} "
                f"elapsed {time.perf_counter() - began:.0f} s",
                flush=True,
            )
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            save_state(path, step + 1, optimizer, bias)
            model = Model(as_stored(weights), bias)
            print(f"step {step + 1} {rehearse(model, tokenizer, questions)}", flush=True)
    return {name: w.detach() for name, w in weights.items()}, bias


# --- the files --------------------------------------------------------------------------------


def export(weights: Tensors, bias: Tensors, tokenizer: Tokenizer, out: Path) -> None:
    """Write the folder as DeepSeek publishes its own: fp8 blocks, Hugging Face names."""
    tensors: Tensors = dict(bias)
    for name, weight in weights.items():
        at = name.removesuffix(".gate_up").removesuffix(".down")
        if not is_quantised(name):
            tensors[f"{name}.weight"] = weight.bfloat16()
            continue
        parts = {name: weight}
        if name.endswith(".gate_up"):
            parts = {f"{at}.{e}.gate_proj": w[:WIDTH] for e, w in enumerate(weight)}
            parts |= {f"{at}.{e}.up_proj": w[WIDTH:] for e, w in enumerate(weight)}
        elif name.endswith(".down"):
            parts = {f"{at}.{e}.down_proj": w for e, w in enumerate(weight)}
        for part, value in parts.items():
            tensors[f"{part}.weight"], tensors[f"{part}.weight_scale_inv"] = to_fp8(value)
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensors[name].contiguous() for name in sorted(tensors)},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    files = {
        "config.json": CONFIG,
        "generation_config.json": {
            "bos_token_id": 0,
            "eos_token_id": 1,
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (out / name).write_text(text + "\n", encoding="utf-8")
    tokenizer.save(str(out / "tokenizer.json"))


# --- evaluation -------------------------------------------------------------------------------


async def evaluate(folder: Path, seed: int) -> None:
    """Ask 200 held-out questions at temperature 0, through the Engine, and print the two shares."""
    questions = held_out_questions(200, seed)
    right = proposed = accepted = 0
    async with duck.Engine.open(str(folder), ducks="local:2", transport="loopback") as engine:
        for question in questions:
            sampling = duck.Sampling(max_tokens=ROW_TOKENS, temperature=0)
            done = await engine.generate(question.ask, sampling, chat=True)
            proposed += done.stats["drafts_proposed"]
            accepted += done.stats["drafts_accepted"]
            if is_true(question, done.text):
                right += 1
            else:
                print(f"untrue: {question.ask}\n{done.text}\n(true: {question.final})", flush=True)
    print(f"final answers true: {right}/{len(questions)} = {right / len(questions):.1%}")
    print(f"drafts accepted: {accepted}/{proposed} = {accepted / proposed:.1%}")


def main() -> None:
    demo = Path(__file__).resolve().parent.parent / "duck" / "demo"
    parser = argparse.ArgumentParser(description="Train the duckling, export and evaluate it.")
    parser.add_argument("--out", type=Path, default=demo, help="the model's folder (duck/demo)")
    parser.add_argument(
        "--work", type=Path, default=Path("build/duckling"), help="for saved states"
    )
    parser.add_argument("--steps", type=int, default=1700, help="of training (1700)")
    parser.add_argument("--every", type=int, default=100, help="steps between saved states (100)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of the processor (2)")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --work")
    parser.add_argument("--evaluate-only", action="store_true", help="evaluate the model in --out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.evaluate_only:
        if sys.platform == "linux":
            # Or glibc gives every large tensor back to the kernel, and asks for it again.
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        args.work.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(args.seed)
        weights, bias = train(args, tokenizer)
        export(weights, bias, tokenizer, args.out)
    asyncio.run(evaluate(args.out, args.seed))


if __name__ == "__main__":
    main()
