"""transformers' DeepSeek models as the judge, loaded from the same folder by other code.

Its own fp8 dequantiser is not used: on a CPU it guesses the block edge from the shapes. Weights are
dequantised here with torch's float8 types and handed over in float32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
)

_MODELS: dict[str, tuple[Any, Any]] = {
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "deepseek_v32": (DeepseekV32Config, DeepseekV32ForCausalLM),
    "glm_moe_dsa": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM),
    "kimi_k2": (DeepseekV3Config, DeepseekV3ForCausalLM),
}


@dataclass
class Reference:
    """One model in transformers, float32, eager attention."""

    model: Any
    tensors: dict[str, Tensor]  # of the whole checkpoint, float32
    layers: int
    has_mtp: bool
    # Of the last text: (T, K) positions that each layer's indexer selected for each row.
    selected: dict[int, Tensor] = field(default_factory=dict)

    def watch(self) -> None:
        """Keep `selected` up to date, of models that have an indexer."""
        for number, layer in enumerate(self.model.model.layers):

            def note(_module: Any, _args: Any, output: Tensor, number: int = number) -> None:
                self.selected[number] = output[0]

            if hasattr(layer.self_attn, "indexer"):
                layer.self_attn.indexer.register_forward_hook(note)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        """(T, vocab)."""
        return self.model(torch.tensor([ids]), use_cache=False).logits[0]

    @torch.inference_mode()
    def mtp_logits(self, ids: list[int]) -> Tensor:
        """(T - 1, vocab): row i from (h_i, token i + 1), their decoder layer wired by hand."""
        decoder = self.model.model
        seen: dict[str, Any] = {}

        def remember(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            seen.update(kwargs)  # mask, positions and angles for T - 1 rows

        hook = decoder.layers[0].register_forward_pre_hook(remember, with_kwargs=True)
        h = decoder(torch.tensor([ids[:-1]]), use_cache=False).last_hidden_state[0]  # post norm
        hook.remove()
        name = f"model.layers.{self.layers}"
        embedded = self.tensors["model.embed_tokens.weight"][torch.tensor(ids[1:])]
        pair = (self._rms(embedded, f"{name}.enorm"), self._rms(h, f"{name}.hnorm"))
        z = torch.cat(pair, dim=-1) @ self.tensors[f"{name}.eh_proj.weight"].T
        z = decoder.layers[self.layers](z[None], **seen)
        z = z[0][0] if isinstance(z, tuple) else z[0]  # GLM's brings what it selected
        return self._rms(z, f"{name}.shared_head.norm") @ self.model.lm_head.weight.T

    def _rms(self, x: Tensor, name: str) -> Tensor:
        x = x.double()
        scaled = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return (scaled * self.tensors[f"{name}.weight"].double()).float()


def load(folder: Path) -> Reference:
    """The checkpoint in `folder`, with the MTP layer (if any) as one layer more than are run."""
    raw = json.loads((folder / "config.json").read_text())
    block = raw.pop("quantization_config", {}).get("weight_block_size", (0, 0))
    tensors = _dequantised(folder, block)
    layers, mtp = raw["num_hidden_layers"], raw.get("num_nextn_predict_layers", 0)
    config_class, model_class = _MODELS[raw.pop("model_type")]
    config = config_class(**{**raw, "num_hidden_layers": layers + mtp})
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    config.num_hidden_layers = layers  # its loop runs so many; the MTP layer stays at the side

    state = {
        name: tensor
        for name, tensor in tensors.items()
        if ".experts." not in name
        and not any(f".{part}." in name for part in ("enorm", "hnorm", "eh_proj", "shared_head"))
        and not name.endswith("embed_tokens.weight")
    }
    state["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    if raw.get("tie_word_embeddings"):
        state["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for layer in range(raw["first_k_dense_replace"], layers + mtp):
        name = f"model.layers.{layer}.mlp.experts"

        def stack(projection: str, name: str = name) -> Tensor:
            experts = range(raw["n_routed_experts"])
            return torch.stack([tensors[f"{name}.{e}.{projection}_proj.weight"] for e in experts])

        state[f"{name}.gate_up_proj"] = torch.cat((stack("gate"), stack("up")), dim=1)
        state[f"{name}.down_proj"] = stack("down")
    model.load_state_dict(state, strict=True)
    truth = Reference(model, tensors, layers, bool(mtp))
    truth.watch()
    return truth


def _dequantised(folder: Path, block: tuple[int, int]) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= safetensors.torch.load_file(file)
    out: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = stored.get(f"{name}_scale_inv")
            if scale is None:
                scale = stored[f"{name.removesuffix('.weight')}.scale"]
            if scale.dtype == torch.uint8:
                scale = scale.view(torch.float8_e8m0fnu)
            wide = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            out[name] = tensor.float() * wide[: tensor.shape[0], : tensor.shape[1]]
        elif not name.endswith(("_scale_inv", ".scale")):
            out[name] = tensor.float()
    return out
