"""The chunked loss is the plain one, without its tensor of logits."""

import json
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import scalepeft
from scalepeft.adapters import inject as injection
from scalepeft.core.errors import UserError
from scalepeft.data.tokens import IGNORED
from scalepeft.models import hub
from scalepeft.models.loss import add_token_loss, chunked_cross_entropy

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


def in_chunks(
    hidden: torch.Tensor, labels: torch.Tensor, head: nn.Module, chunk: int
) -> torch.Tensor:
    trained = [p for p in head.parameters() if p.requires_grad]
    return chunked_cross_entropy(hidden, labels, head, chunk, trained)


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
    got = value_and_gradients(lambda h, y, w: in_chunks(h, y, w, chunk), trained)
    want = value_and_gradients(plain, trained)
    assert len(got) == len(want) == (4 if trained else 2)
    for mine, reference in zip(got, want, strict=True):
        # Logits go to the loss in fp32, whatever the model computes in.
        assert (mine - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_an_adapted_head_gets_the_gradient_of_its_adapter() -> None:
    grads = []
    for loss in (plain, lambda h, y, w: in_chunks(h, y, w, 5)):
        hidden, labels, head = sample()
        head = scalepeft.adapt(head.float(), "lora", rank=2, dropout=0)
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
    loss = in_chunks(hidden, torch.full_like(labels, IGNORED), head, 4)
    loss.backward()
    assert loss.item() == 0
    for grad in (hidden.grad, head.weight.grad, head.bias.grad):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, labels, head = sample()
    with torch.no_grad():
        got = in_chunks(hidden, labels, head, 4)
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
    for loss in (plain, lambda h, y, w: in_chunks(h, y, w, 16)):
        with Largest() as largest:
            loss(hidden, labels, head).backward()
        seen.append(largest.numel)
    assert seen[0] == 4 * 64 * 500, "the recorder sees the plain loss's logits"
    assert seen[1] == 16 * 500


SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
HEADS = {"head_dim": 16}
EXPERTS = {
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}  # fmt: skip
ROUTERS = {**EXPERTS, "output_router_logits": True, "router_aux_loss_coef": 0.5}
# Classes that do something to the logits, or to the states, or call their decoder otherwise.
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    ("Cohere", {"logit_scale": 0.25}),
    ("Cohere2", {"logit_scale": 0.25}),
    ("Gemma2", {**HEADS, "final_logit_softcapping": 2.0}),
    ("Gemma3Text", {**HEADS, "final_logit_softcapping": 2.0}),
    ("NanoChat", {"final_logit_softcapping": 2.0}),
    ("Glm4", HEADS),
    ("HyperCLOVAX", {"logits_scaling": 3.0}),
    ("GraniteMoe", {**EXPERTS, "logits_scaling": 4.0}),
    ("Llama4Text", {**EXPERTS, **HEADS, "intermediate_size_mlp": 96}),
    ("Falcon", {}),
    ("GPT2", {}),
    ("Mixtral", EXPERTS),
    ("Mixtral", ROUTERS),
    ("Qwen3Moe", {**ROUTERS, **HEADS}),
    ("GptOss", {**ROUTERS, **HEADS}),
]


def random_model(config: Any, auto: Any = transformers.AutoModelForCausalLM) -> Any:
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(
    family: str, settings: dict[str, Any]
) -> None:
    model = random_model(getattr(transformers, f"{family}Config")(**(SMALL | settings)))
    head = model.get_output_embeddings() or model.lm_head
    names = [n for n, m in model.named_modules() if m is head or n.endswith("q_proj")]
    injection.inject(model, {"name": "lora", "rank": 2, "dropout": 0.0, "target_modules": names})
    trained = injection.trainable(model)
    with torch.no_grad():
        for p in trained.values():
            p.normal_(std=0.1)
    ids = torch.randint(3, 90, (1, 12))
    labels = ids.clone()
    labels[:, :3] = IGNORED
    want = 9 * model(ids, labels=labels, use_cache=False).loss  # a mean of 9, and the routers'
    want_grads = torch.autograd.grad(want, list(trained.values()))
    add_token_loss(model)
    # A second row, of padding alone, and padding behind the first one: neither counts.
    ids = torch.cat([F.pad(ids, (0, 4)), torch.zeros(1, 16, dtype=torch.long)])
    labels = torch.cat([F.pad(labels, (0, 4), value=IGNORED), torch.full((1, 16), IGNORED)])
    got = model(ids, token_labels=labels, loss_chunk=4)
    got_grads = torch.autograd.grad(got, list(trained.values()))
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    for mine, reference in zip(got_grads, want_grads, strict=True):
        assert reference.abs().max() > 0
        assert (mine - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_the_routers_loss_does_not_depend_on_the_micro_batch() -> None:
    model = random_model(transformers.MixtralConfig(**(SMALL | ROUTERS)))
    add_token_loss(model)
    ids = torch.randint(3, 90, (4, 12))
    labels = ids.clone()
    labels[1, :5] = labels[2, 9:] = IGNORED
    whole = model(ids, token_labels=labels, loss_chunk=64)
    rows = [
        model(i[None], token_labels=y[None], loss_chunk=64)
        for i, y in zip(ids, labels, strict=True)
    ]
    assert whole.item() == pytest.approx(sum(rows).item(), rel=1e-5)


VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
PIECES = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92}
QWEN_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
    "fullatt_block_indexes": [0],
}  # fmt: skip
SECTIONS = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
WRAPPERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Gemma3", HEADS, {"vision_config": VISION, "mm_tokens_per_image": 4, "image_token_id": 90}),
    (
        "Mistral3",
        {**HEADS, "model_type": "mistral"},
        {"vision_config": VISION | {"model_type": "pixtral"} | HEADS, "image_token_index": 90},
    ),
    ("Qwen2_5_VL", SECTIONS, {"vision_config": QWEN_VISION, **PIECES}),
]


@pytest.mark.parametrize(("family", "text", "settings"), WRAPPERS)
def test_a_wrapper_of_a_text_decoder_has_its_own_logits_too(
    family: str, text: dict[str, Any], settings: dict[str, Any]
) -> None:
    config = getattr(transformers, f"{family}Config")(text_config=SMALL | text, **settings)
    model = random_model(config, transformers.AutoModelForImageTextToText)
    ids = torch.randint(3, 89, (2, 12))
    logits = model(input_ids=ids, use_cache=False).logits
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    add_token_loss(model)
    got = model(ids, token_labels=ids, loss_chunk=4)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def on_meta() -> Any:
    return hub.meta_model(transformers.LlamaConfig(**SMALL), "here", dtype=torch.float32)


def test_a_class_whose_logits_are_not_shown_to_be_its_heads_is_refused() -> None:
    class Mixing(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.mean(1, keepdim=True)
            return out

    class Alone(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
            return transformers.modeling_outputs.CausalLMOutput(
                logits=self.lm_head(self.model.norm(inputs_embeds))
            )

    for kind in (Mixing, Alone):
        model = on_meta()
        model.__class__ = kind
        with pytest.raises(UserError, match=f"{kind.__name__} is not supported: .* token by token"):
            add_token_loss(model)


def test_a_vocabulary_may_be_as_large_as_a_state() -> None:
    config = transformers.LlamaConfig(**SMALL | {"vocab_size": SMALL["hidden_size"]})
    add_token_loss(hub.meta_model(config, "here", dtype=torch.float32))


@pytest.mark.parametrize("sizes", [{"num_attention_heads": 0}, {"hidden_size": -64}])
def test_sizes_that_no_model_has_are_named(sizes: dict[str, int], tmp_path: Any) -> None:
    held = transformers.LlamaConfig(**SMALL).to_dict() | sizes
    (tmp_path / "config.json").write_text(json.dumps(held))
    with pytest.raises(UserError, match=r"zero|negative dimension"):
        hub.meta_model(hub.architecture(tmp_path), f"model.path={tmp_path}")
