"""The chunked loss is the plain one, without its tensor of logits."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import scalepeft
from scalepeft.data.tokens import IGNORED
from scalepeft.models.loss import chunked_cross_entropy

WIDTH, VOCABULARY = 12, 97


def sample(batch: int = 3, length: int = 11) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    torch.manual_seed(4)
    hidden = torch.randn(batch, length, WIDTH, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (batch, length))
    labels[0, :5] = IGNORED
    labels[1, 7:] = IGNORED
    labels[2, 0] = 3  # the first token has nothing to predict it from
    return hidden, labels, nn.Linear(WIDTH, VOCABULARY).double()


def plain(hidden: torch.Tensor, labels: torch.Tensor, head: nn.Module) -> torch.Tensor:
    logits = head(hidden[:, :-1]).flatten(0, 1)
    wanted = labels[:, 1:].flatten()
    return F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")


def value_and_gradients(loss: Any, trained: bool) -> list[torch.Tensor]:
    hidden, labels, head = sample()
    head.requires_grad_(trained)
    hidden.requires_grad_()
    value = loss(hidden, labels, head)
    (value * 1.7).backward()
    assert (head.weight.grad is not None) == trained
    grads = [p.grad for p in head.parameters() if p.grad is not None]
    return [value.detach(), hidden.grad, *grads]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 7, 22, 10_000])
def test_value_and_gradients_are_those_of_cross_entropy(chunk: int, trained: bool) -> None:
    got = value_and_gradients(lambda h, y, w: chunked_cross_entropy(h, y, w, chunk), trained)
    want = value_and_gradients(plain, trained)
    assert len(got) == len(want) == (4 if trained else 2)
    for mine, reference in zip(got, want, strict=True):
        # Logits go to the loss in fp32, whatever the model computes in.
        assert (mine - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_an_adapted_head_gets_the_gradient_of_its_adapter() -> None:
    grads = []
    for loss in (plain, lambda h, y, w: chunked_cross_entropy(h, y, w, 5)):
        hidden, labels, head = sample()
        head = scalepeft.adapt(head.float(), "lora", rank=2)
        with torch.no_grad():
            head.adapter.B.normal_(generator=torch.Generator().manual_seed(2))
        loss(hidden.float(), labels, head).backward()
        grads.append([head.adapter.A.grad, head.adapter.B.grad])
        assert head.weight.grad is None
    for mine, reference in zip(*grads, strict=True):
        assert reference.abs().max() > 0
        assert (mine - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_nothing_to_learn_gives_zero_and_a_zero_gradient() -> None:
    hidden, labels, head = sample()
    hidden.requires_grad_()
    loss = chunked_cross_entropy(hidden, torch.full_like(labels, IGNORED), head, 4)
    loss.backward()
    assert loss.item() == 0
    for grad in (hidden.grad, head.weight.grad, head.bias.grad):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, labels, head = sample()
    with torch.no_grad():
        got = chunked_cross_entropy(hidden, labels, head, 4)
    assert not got.requires_grad
    assert got.item() == pytest.approx(plain(hidden, labels, head).item(), rel=1e-6)


class Largest(TorchDispatchMode):
    """Records the numel of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_no_tensor_of_tokens_by_vocabulary_exists() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 65, 8, requires_grad=True)
    labels = torch.randint(500, (4, 65))
    head = nn.Linear(8, 500, bias=False).requires_grad_(False)
    seen = []
    for loss in (plain, lambda h, y, w: chunked_cross_entropy(h, y, w, 16)):
        with Largest() as largest:
            loss(hidden, labels, head).backward()
        seen.append(largest.numel)
    assert seen[0] == 4 * 64 * 500, "the recorder sees the plain loss's logits"
    assert seen[1] == 16 * 500
