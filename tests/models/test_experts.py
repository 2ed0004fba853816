"""Mixtures of experts: their split form computes what transformers' own does, plain and stored."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from finished import adapted, make_run, stock
from processes import FULL, Job
from safetensors.torch import load_file
from torch import Tensor, nn

import scalepeft
from scalepeft.core.errors import UserError
from scalepeft.export import merge, peft
from scalepeft.models import hub as models
from scalepeft.models import quant, structure
from scalepeft.models import weights as weights_
from scalepeft.models.experts import ExpertLinear, Experts, TallSource, replace_experts
from scalepeft.models.sources import Source
from scalepeft.models.weights import Weights, load_weights

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
       "v_head_dim": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
       "n_routed_experts": 4, "moe_intermediate_size": 64, "num_key_value_heads": 4}  # fmt: skip
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (tf.MixtralConfig, {"intermediate_size": 128, "num_local_experts": 4}),
    "qwen2_moe": (
        tf.Qwen2MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
         "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        tf.Qwen3MoeConfig,
        {"head_dim": 16, "num_experts": 6, "moe_intermediate_size": 64, "num_experts_per_tok": 3},
    ),
    "olmoe": (
        tf.OlmoeConfig, {"intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    ),
    "gpt_oss": (
        tf.GptOssConfig,
        {"head_dim": 16, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "phimoe": (tf.PhimoeConfig, {"intermediate_size": 64, "num_local_experts": 4}),
    "granitemoe": (tf.GraniteMoeConfig, {"intermediate_size": 64, "num_local_experts": 4}),
    "deepseek_v3": (tf.DeepseekV3Config, {**MLA, "num_experts_per_tok": 2}),
    "nemotron_h": (
        tf.NemotronHConfig,
        {"layers_block_type": ["moe", "attention"], "n_routed_experts": 4, "head_dim": 16,
         "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64,
         "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    ),
    "llama4_text": (
        tf.Llama4TextConfig,
        {"intermediate_size": 64, "intermediate_size_mlp": 64, "num_local_experts": 4,
         "head_dim": 16, "num_experts_per_tok": 2},
    ),
}  # fmt: skip


JETMOE = tf.JetMoeConfig(
    vocab_size=96, hidden_size=64, num_hidden_layers=1, num_key_value_heads=2, kv_channels=16,
    intermediate_size=64, num_local_experts=4, num_experts_per_tok=2,
)  # fmt: skip


def eager(family: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, more = FAMILIES[family]
    torch.manual_seed(0)
    config = kind(**{**SIZES, **more})
    model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval().requires_grad_(False)


def run(model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the embeddings."""
    x = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits = model(inputs_embeds=x.requires_grad_()).logits
    logits.square().sum().backward()
    assert x.grad is not None
    return logits.detach(), x.grad


def close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], limit: float = 1e-5) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= limit * b.abs().max()


def experts_of(model: nn.Module) -> list[tuple[str, ExpertLinear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, ExpertLinear)]


def transposed(module: nn.Module) -> bool:
    return getattr(module, "is_transposed", True)  # Llama 4's has no marks


def unfused(model: nn.Module, name: str) -> Tensor:
    """The rows of a module's own fused tensor, expert by expert, transformers' layout undone."""
    parent, _, key = name.rpartition(".")
    module = model.get_submodule(parent)
    return torch.cat([w.T if transposed(module) else w for w in getattr(module, key)])


@pytest.mark.parametrize("family", FAMILIES)
def test_split_experts_equal_transformers(family: str) -> None:
    model = eager(family)
    split = copy.deepcopy(model)
    assert replace_experts(split) == []
    calls: list[str] = []
    for name, module in experts_of(split):
        assert torch.equal(module.weight, unfused(model, name)), name
        assert torch.equal(module.fused(module.weight), getattr(*_parent(model, name)))
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    close(run(split), run(model))
    assert calls == [name for name, _ in experts_of(split)] and calls
    again = copy.deepcopy(split)
    assert replace_experts(again) == [] and repr(again) == repr(split)


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, key = name.rpartition(".")
    return model.get_submodule(parent), key


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h", "llama4_text"])
def test_stored_experts_equal_their_decoded_values(family: str, storage: str) -> None:
    model = eager(family)
    split = copy.deepcopy(model)
    replace_experts(split)
    fmt = quant.get_format(storage)
    assert fmt is not None
    for name, module in experts_of(split):
        quant.quantize(module, fmt)
        assert isinstance(module, quant.QuantLinear) and module.weight.dtype == torch.uint8
        values = quant.Frozen(module).weight(torch.float32)
        assert values.shape == (module.num_experts * module.out_features, module.in_features)
        parent, key = _parent(model, name)
        rows = values.view(module.num_experts, module.out_features, -1)
        getattr(parent, key).copy_(rows.mT if transposed(parent) else rows)
    close(run(split), run(model))


def both(family: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The first experts module of a model, ours and transformers'."""
    model = eager(family, dtype)
    split = copy.deepcopy(model)
    replace_experts(split)
    ours, _ = _parent(split, experts_of(split)[0][0])
    theirs, _ = _parent(model, experts_of(split)[0][0])
    assert isinstance(ours, Experts) and not isinstance(theirs, Experts)
    return ours, theirs


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_bf16_plain_goes_through_transformers_grouped_product(family: str) -> None:
    found = []
    index = torch.tensor([[0, 1], [3, 1], [1, 3], [3, 0], [0, 3]])  # never 2
    for experts in both(family, torch.bfloat16):
        generator = torch.Generator().manual_seed(1)
        x, dy = (torch.randn(5, 64, generator=generator).bfloat16() for _ in "xy")
        y = experts(x.requires_grad_(), index, torch.rand(5, 2, generator=generator).bfloat16())
        y.backward(dy)
        found.append((y, x.grad))
    for got, want in zip(*found, strict=True):
        assert (got - want).float().norm() <= 1e-2 * want.float().norm()


def test_a_number_past_the_last_is_no_expert() -> None:
    ours, theirs = both("mixtral", torch.float32)
    x, weights = torch.randn(5, 64), torch.rand(5, 2)
    index = torch.tensor([[0, 4], [4, 4], [1, 3], [3, 0], [4, 2]])
    close((ours(x, index, weights),), (theirs(x, index, weights),))
    nobody = ours(x, torch.full((5, 2), 4), weights)
    assert nobody.shape == x.shape and not nobody.any()


class InMemory(Source):
    where = "here"

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.read = tensor, list[tuple[int, int]]()
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype

    def rows(self, first: int, last: int) -> Tensor:
        self.read.append((first, last))
        return self.tensor[first:last]


def test_rows_are_read_by_whole_experts() -> None:
    fused = torch.randn(4, 6, 5)
    for transposed in (False, True):
        layer = ExpertLinear(fused, transposed)
        assert torch.equal(layer.fused(layer.weight), fused)
        source = InMemory(fused)
        tall = TallSource(source, layer)
        assert tall.shape == layer.weight.shape
        for first in range(0, len(layer.weight) + 1):
            for last in range(first, len(layer.weight) + 1):
                assert torch.equal(tall.rows(first, last), layer.weight[first:last])
        source.read.clear()
        n = layer.out_features
        tall.rows(n, 2 * n + 1)
        assert source.read == [(1, 3)]
    with torch.device("meta"):
        assert ExpertLinear(torch.empty(4, 6, 5), True).weight.shape == (20, 6)


def test_experts_of_another_layout_stay_and_are_named() -> None:
    model = tf.AutoModelForCausalLM.from_config(JETMOE)
    assert replace_experts(model) == ["JetMoeParallelExperts"]
    conv = nn.Sequential(nn.Conv1d(4, 4, 3))
    assert replace_experts(conv) == []


@pytest.mark.parametrize("method", ["hoft", "lora"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text"])
def test_adapted_experts_equal_a_model_with_their_merged_weights(family: str, method: str) -> None:
    model = eager(family)
    split = copy.deepcopy(model)
    replace_experts(split)
    for _, module in experts_of(split):
        quant.quantize(module, quant.NF4())
    targets = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]
    settings = {"lora": {"dropout": 0.0}}.get(method, {})
    scalepeft.inject(split, {"name": method, "rank": 4, **settings, "target_modules": targets})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in split.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    for name, layer in split.named_modules():
        if not hasattr(layer, "adapter"):
            continue
        w, bias = scalepeft.effective_weight(layer)
        assert bias is None or name.endswith("q_proj")  # gpt-oss has biases
        if isinstance(layer, ExpertLinear):
            parent, key = _parent(model, name)
            rows = w.view(layer.num_experts, layer.out_features, -1)
            getattr(parent, key).copy_(rows.mT if transposed(parent) else rows)
        else:
            model.get_submodule(name).weight.copy_(w)
    close(run(split), run(model), 3e-5)


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "nemotron_h", "llama4_text"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as transformers saves it: an expert a tensor, or fused."""
    path = tmp_path_factory.mktemp("base") / request.param
    eager(request.param).save_pretrained(path)
    return path


TARGETS = {"target_modules": ["q_proj", "*.experts.*"]}


@pytest.mark.parametrize("method", ["hoft", "lora"])
@pytest.mark.parametrize("storage", ["none", "nf4"])
def test_loads_as_stock_and_merges_into_it(
    folder: Path, tmp_path: Path, method: str, storage: str
) -> None:
    run_dir = make_run(tmp_path / "run", folder, method, quant=storage, adapter=TARGETS)
    ids = torch.arange(40).view(2, 20)
    if storage == "none":
        config = models.ModelConfig(path=str(folder))
        base = structure.build(config, folder, "fp32", weights := Weights(folder))
        structure.materialize(base, torch.device("cpu"))
        for _ in load_weights(base, weights):
            pass
        close((base.eval()(ids).logits,), (stock(folder)(ids).logits,))
    out = tmp_path / "merged"
    kind = "original" if storage == "none" else "dequantized"
    merge.run(str(run_dir), str(out), [], kind, "base")
    want = adapted(run_dir)(ids).logits
    assert (want - stock(folder)(ids).logits).abs().max() > 0.01
    close((stock(out)(ids).logits,), (want,), 3e-5)
    before, after = (load_file(f / "model.safetensors") for f in (folder, out))
    assert {k: t.shape for k, t in before.items()} == {k: t.shape for k, t in after.items()}


@pytest.mark.parametrize("piece", [1, 20_000, 1 << 26])
def test_every_byte_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(weights_, "PIECE_BYTES", piece)
    weights = Weights(folder)
    model = structure.build(models.ModelConfig(path=str(folder)), folder, "fp32", weights)
    structure.materialize(model, torch.device("cpu"))
    before = weights.bytes_read
    for _ in load_weights(model, weights):
        pass
    used = sum(4 * p.numel() for p in [*model.parameters()])
    used += sum(b.nbytes for n, b in model.named_buffers() if n in model.state_dict())
    assert weights.bytes_read - before == used
    want = stock(folder).state_dict()
    for name, layer in experts_of(model):
        assert torch.equal(layer.fused(layer.weight), want[name])


def test_a_layout_that_is_not_known_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    JETMOE.save_pretrained(tmp_path)
    structure.build(models.ModelConfig(path=str(tmp_path), quant="nf4"), tmp_path, "fp32")
    said = capsys.readouterr()
    assert "JetMoeParallelExperts stays unquantized in every block: 3-d" in said.out + said.err


def test_a_model_of_transformers_takes_adapters_of_experts() -> None:
    model = eager("mixtral")
    want = run(model)
    scalepeft.inject(
        model, {"name": "lora", "dropout": 0.0, "target_modules": ["experts.down_proj"]}
    )
    close(run(model), want)
    assert [n for n, p in model.named_parameters() if p.requires_grad][:2] == [
        f"model.layers.0.mlp.experts.down_proj.adapter.{key}" for key in "AB"
    ]


def test_exports_have_no_place_for_experts(tmp_path: Path) -> None:
    eager("mixtral").save_pretrained(tmp_path / "base")
    run_dir = make_run(tmp_path / "run", tmp_path / "base", "lora", adapter=TARGETS)
    for format in ("peft", "lora"):
        with pytest.raises(UserError, match=r"experts\.gate_up_proj has an adapter for each exp"):
            peft.run(str(run_dir), str(tmp_path / "out"), [], format)
    assert not (tmp_path / "out").exists()
    hadamard = {"target_modules": ["*.experts.down_proj"], "train_norm": False}
    run_dir = make_run(tmp_path / "run2", tmp_path / "base", "hadamard-after", adapter=hadamard)
    with pytest.raises(UserError, match=r"adds a bias to model\.layers\.0\.mlp\.experts\.down_pr"):
        merge.run(str(run_dir), str(tmp_path / "out"), [], "original", "base")


@pytest.mark.slow
def test_engines_give_the_steps_of_one_process() -> None:
    program = str(Path(__file__).with_name("expert_ranks.py"))
    codes, text = Job(2, ["all"] if FULL else [], program=(program,)).wait(300)
    assert codes == [0, 0], text
    assert text.count("ok ") == 2 * 5 * (6 if FULL else 2), text
