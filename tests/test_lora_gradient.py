"""LoRA saves storage, not the product with W: its backward by hand equals autograd's.

y = x W^T + (x A^T) B^T s with s = alpha / r, and g the gradient of y:

    dA = s (g B)^T x        r x in, needs x
    dB = s g^T (x A^T)      out x r, needs x A^T, r numbers a token
    dx = g W + s (g B) A    needs W: the frozen matrix is multiplied in backward too
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

TOKENS, INTO, OUT, RANK, ALPHA = 7, 12, 10, 3, 16.0


@pytest.fixture
def tensors() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": random(TOKENS, INTO).requires_grad_(),
        "W": random(OUT, INTO),
        "A": random(RANK, INTO).requires_grad_(),
        "B": random(OUT, RANK).requires_grad_(),
        "g": random(TOKENS, OUT),
    }


def forward(x: Any, w: Any, a: Any, b: Any) -> Any:
    return x @ w.T + (b @ a @ x.T).T * (ALPHA / RANK)


def test_the_gradient_by_hand_is_autograds(tensors: dict[str, Any]) -> None:
    x, w, a, b, g = (tensors[k] for k in ("x", "W", "A", "B", "g"))
    s = ALPHA / RANK
    by_hand = (g @ w + s * (g @ b) @ a, s * (g @ b).T @ x, s * g.T @ (x @ a.T))
    by_autograd = torch.autograd.grad(forward(x, w, a, b), (x, a, b), g)
    for mine, theirs in zip(by_hand, by_autograd, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_pefts_layer_computes_the_same(tensors: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    base = torch.nn.Linear(INTO, OUT, bias=False, dtype=torch.float64)
    model = torch.nn.Sequential(base)
    layer = peft.get_peft_model(
        model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"]), autocast_adapter_dtype=False
    ).base_model.model[0]
    x, w, a, b, g = (tensors[k] for k in ("x", "W", "A", "B", "g"))
    with torch.no_grad():
        base.weight.copy_(w)
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
    weights = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    theirs = torch.autograd.grad(layer(x), (x, *weights), g)
    for mine, his in zip(torch.autograd.grad(forward(x, w, a, b), (x, a, b), g), theirs, strict=True):
        torch.testing.assert_close(mine, his)


def test_multiplying_adapters_and_weight_first_is_the_same(tensors: dict[str, Any]) -> None:
    x, w, a, b, g = (tensors[k] for k in ("x", "W", "A", "B", "g"))
    merged = x @ (w + (b @ a) * (ALPHA / RANK)).T
    torch.testing.assert_close(merged, forward(x, w, a, b))
    for mine, theirs in zip(
        torch.autograd.grad(merged, (x, a, b), g), torch.autograd.grad(forward(x, w, a, b), (x, a, b), g), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
