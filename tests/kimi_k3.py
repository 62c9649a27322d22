"""Kimi K3 in torch, as memplan understands it: its own parts within transformers' Kimi Linear.

They follow the equations of the Attention Residuals paper (arXiv:2603.15031) and the code published with its weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import KimiLinearConfig
from transformers.models.kimi_linear import modeling_kimi_linear as kimi

F = nn.functional
NORM_EPS = 1e-5


def choose(total: Any, sums: Any, norm: Any, proj: Any) -> Any:
    """Return the sum of earlier layers' sums and the current one, weighted by a softmax over one number each."""
    each = torch.cat((sums, total[:, :, None]), dim=2)
    wide = each.float()
    variance = wide.pow(2).mean(-1, keepdim=True)
    keys = wide * torch.rsqrt(variance + norm.variance_epsilon)
    numbers = (keys * (norm.weight.float() * proj.weight.squeeze(0).float())).sum(-1)
    probs = numbers.softmax(-1).unsqueeze(2)
    return torch.matmul(probs, wide).squeeze(2).to(each.dtype)


def situ(joined: Any, beta: float, linear_beta: float | None) -> Any:
    half = joined.shape[-1] // 2
    gate, up = joined[..., :half].float(), joined[..., half:].float()
    curve = beta * torch.tanh(gate / beta) * torch.sigmoid(gate)
    if linear_beta is not None:
        up = linear_beta * torch.tanh(up / linear_beta)
    return (curve * up).to(joined.dtype)


class MLP(nn.Module):
    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(config.hidden_size, width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.betas = config.activation_situ_beta, config.activation_situ_linear_beta

    def forward(self, x: Any) -> Any:
        joined = torch.cat([self.gate_proj(x), self.up_proj(x)], dim=-1)
        return self.down_proj(situ(joined, *self.betas))


def narrow(config: Any) -> Any:
    """Return the config with the keys that the expert stack reads."""
    made = KimiLinearConfig(
        **{**config.to_dict(), "hidden_size": config.routed_expert_hidden_size, "hidden_act": "silu"}
    )
    made._experts_implementation = "grouped_mm"
    return made


class MoE(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        low, betas = config.routed_expert_hidden_size, (config.activation_situ_beta, config.activation_situ_linear_beta)
        self.experts = kimi.KimiLinearExperts(narrow(config))
        self.experts._apply_gate = lambda joined: situ(joined, *betas)
        self.gate = kimi.KimiLinearTopkRouter(config)
        self.shared_experts = MLP(config, config.moe_intermediate_size * config.n_shared_experts)
        self.routed_expert_down_proj = nn.Linear(config.hidden_size, low, bias=False)
        self.routed_expert_up_proj = nn.Linear(low, config.hidden_size, bias=False)
        self.routed_expert_norm = kimi.KimiLinearRMSNorm(low, NORM_EPS)

    def forward(self, x: Any) -> Any:
        _, weights, chosen = self.gate(x)
        latent = self.routed_expert_down_proj(x.view(-1, x.shape[-1]))
        made = self.experts(latent, chosen, weights)
        return self.routed_expert_up_proj(self.routed_expert_norm(made)).view(*x.shape) + self.shared_experts(x)


class GatedOutput(nn.Module):
    """Replaces `o_proj`: gates attention's output by the layer's input."""

    def __init__(self, config: Any, owner: nn.Module) -> None:
        super().__init__()
        self.weight = owner.o_proj.weight
        self.g_proj = nn.Linear(config.hidden_size, owner.o_proj.in_features, bias=False)
        self.given: list[Any] = []
        owner.register_forward_pre_hook(
            lambda _, __, kwargs: self.given.append(kwargs["hidden_states"]), with_kwargs=True
        )

    def forward(self, attended: Any) -> Any:
        return F.linear(attended * self.g_proj(self.given.pop()).sigmoid(), self.weight)


class ForgetGate(kimi.KimiLinearForgetGate):
    bound = -5.0

    def forward(self, x: Any) -> Any:
        raw = self.f_b_proj(self.f_a_proj(x)).float() + self.dt_bias.float().view(1, 1, -1)
        return self.bound * torch.sigmoid(torch.exp(self.A_log.float()) * raw.view(*x.shape[:2], -1, self.head_dim))


class Layer(kimi.KimiLinearDecoderLayer):
    def __init__(self, config: Any, number: int) -> None:
        super().__init__(config, number)
        self.number, self.every = number, config.attn_res_block_size
        sparse = config.mlp_layer_types[number] == "sparse"
        self.mlp = MoE(config) if sparse else MLP(config, config.intermediate_size)
        if self.block_type == "full_attention":
            self.self_attn.o_proj = GatedOutput(config, self.self_attn)
        else:
            self.self_attn.forget_gate = ForgetGate(config)
            self.self_attn.g_a_proj = nn.Identity()
            width = config.linear_head_dim * config.linear_num_heads
            self.self_attn.g_b_proj = nn.Linear(config.hidden_size, width, bias=False)
        for name in ("self_attention", "mlp"):
            setattr(self, f"{name}_res_norm", kimi.KimiLinearRMSNorm(config.hidden_size, NORM_EPS))
            setattr(self, f"{name}_res_proj", nn.Linear(config.hidden_size, 1, bias=False))

    def forward(self, x: Any, sums: Any, mask: Any) -> Any:
        total, h = x, x
        if sums.shape[2]:
            h = choose(total, sums, self.self_attention_res_norm, self.self_attention_res_proj)
        opens = self.number % self.every == 0
        if opens:
            sums = torch.cat((sums, total[:, :, None]), dim=2)
        h = self.input_layernorm(h)
        h = self.self_attn(hidden_states=h, attention_mask=mask)
        h = h[0] if isinstance(h, tuple) else h
        total = h if opens else total + h
        h = self.post_attention_layernorm(choose(total, sums, self.mlp_res_norm, self.mlp_res_proj))
        return total + self.mlp(h), sums


class Model(nn.Module):
    """The decoder with its head: `language_model` of the full model."""

    def __init__(self, **keys: Any) -> None:
        super().__init__()
        self.config = config = KimiLinearConfig(**{**keys, "hidden_act": "silu"})
        config._attn_implementation = "eager"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.output_attn_res_norm = kimi.KimiLinearRMSNorm(config.hidden_size, NORM_EPS)
        self.output_attn_res_proj = nn.Linear(config.hidden_size, 1, bias=False)
        self.norm = kimi.KimiLinearRMSNorm(config.hidden_size, NORM_EPS)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: Any, labels: Any) -> Any:
        x = self.embed_tokens(ids)
        b, s, h = x.shape
        least = torch.finfo(x.dtype).min
        mask = torch.full((b, 1, s, s), least, dtype=x.dtype).triu(1)
        sums = x.new_zeros(b, s, 0, h)
        for layer in self.layers:
            x, sums = layer(x, sums, mask if layer.block_type == "full_attention" else None)
        x = self.norm(choose(x, sums, self.output_attn_res_norm, self.output_attn_res_proj))
        logits = self.lm_head(x).float()
        targets = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-100)


class Tower(nn.Module):
    """The weights of the vision tower and its projector, by the full model's config."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        h, wide, inner = vision["vt_hidden_size"], vision["vt_intermediate_size"], vision["qkv_hidden_size"]
        merged, text = vision["mm_hidden_size"] * 4, vision["text_hidden_size"]
        self.patches = nn.Conv2d(3, h, vision["patch_size"], bias=False)
        self.places = nn.Parameter(torch.empty(vision["init_pos_emb_height"], vision["init_pos_emb_width"], h))
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                (
                    *(nn.RMSNorm(h) for _ in range(2)),
                    *(nn.Linear(a, b, bias=False) for a, b in ((h, 3 * inner), (inner, h), (h, wide), (wide, h))),
                )
            )
            for _ in range(vision["vt_num_hidden_layers"])
        )
        self.norm = nn.RMSNorm(h)
        self.first, self.second = nn.Linear(merged, merged, bias=False), nn.Linear(merged, text, bias=False)
        self.last = nn.RMSNorm(text)


class Whole(nn.Module):
    """The decoder and its tower, by the full model's config. It holds weights, and is not called."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.vision_tower = Tower(config["vision_config"])
        self.language_model = Model(**config["text_config"])

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        return self.language_model.lm_head
