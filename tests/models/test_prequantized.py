"""Pre-quantized bases: values and bytes as the libraries that wrote them have them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from finished import make_run
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from scalepeft.adapters import inject
from scalepeft.core.errors import UserError
from scalepeft.export import merge
from scalepeft.models import hub, loss, prequantized, quant, structure
from scalepeft.models.weights import Weights, load_weights

LAYER = "model.layers.0.mlp.down_proj"


@dataclass
class Held:
    """A tensor as a file's source; counts the rows that are read."""

    value: Tensor
    where: str = "model.safetensors"
    read: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def rows(self, first: int, last: int) -> Tensor:
        self.read += last - first
        return self.value[first:last].clone() if self.value.dim() else self.value.clone().view(1)

    def whole(self) -> Tensor:
        return self.rows(0, self.shape[0] if self.shape else 1)

    def encoded(self, fmt: quant.Format, first: int, last: int) -> None:
        return None


def sources(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: Held(tensor) for name, tensor in tensors.items()}


def llama(folder: Path, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **settings))
    model.save_pretrained(folder)
    return model


def bnb(folder: Path, **settings: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A base as transformers saves it: (its model, quantization_config, sources of its file)."""
    llama(folder / "plain")
    asked = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=asked, dtype=torch.bfloat16
    )
    model.save_pretrained(folder / "small")
    held = json.loads((folder / "small/config.json").read_text())
    files = load_file(folder / "small/model.safetensors")
    return model, prequantized.settings_of(held), sources(files)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bnb_4_bits_are_read_as_bitsandbytes_decodes_them(
    kind: str, double: bool, tmp_path: Path
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    model, settings, files = bnb(
        tmp_path, load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
    )
    found = prequantized.read(settings, files)
    assert set(found) == {name for name in files if name.endswith("weight")}
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(layers) == 14
    for name, layer in layers.items():
        source = found[f"{name}.weight"]
        want = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert source.dtype == want.dtype == torch.bfloat16
        assert source.shape == want.shape
        assert torch.equal(source.rows(0, len(want)), want)
        assert torch.equal(source.rows(5, 9), want[5:9])
        bytes_of = source.encoded(quant.NF4(), 5, 9)
        if kind == "fp4":
            assert bytes_of is None
            continue
        packed = layer.weight.data.view(len(want), -1)
        assert torch.equal(bytes_of[0], packed[5:9])
        decoded = quant.NF4().decode(*bytes_of, want.shape[1], torch.bfloat16)
        assert torch.equal(decoded, want[5:9])
        assert source.encoded(quant.Int8(), 5, 9) is None
        twice = source.encoded(quant.NF4(double=True), 5, 9)  # codes stay, scales in 8 bits
        assert torch.equal(twice[0], packed[5:9])
        near = quant.NF4(double=True).decode(*twice, want.shape[1], torch.float32)
        assert (near - want[5:9].float()).abs().max() < 2e-2 * want.abs().max()


@pytest.mark.parametrize(("out", "width", "size"), [(6, 96, 64), (5, 7, 64), (8, 128, 256)])
def test_bnb_blocks_run_on_over_rows(out: int, width: int, size: int) -> None:
    from bitsandbytes.functional import quantize_4bit

    w = torch.randn(out, width)
    packed, state = quantize_4bit(w, quant_type="nf4", blocksize=size)
    parts = {f"x.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    files = sources({"x.weight": packed, **parts})
    source = prequantized.read({"quant_method": "bitsandbytes"}, files)["x.weight"]
    # bitsandbytes 0.50.2 encodes blocks that run on, on every device; its CPU kernel alone decodes
    # as though each row began one, so that its values are not taken here.
    pairs = [code for byte in packed.view(-1).tolist() for code in (byte >> 4, byte & 15)]
    values = [state.code[c] * state.absmax[i // size] for i, c in enumerate(pairs[: out * width])]
    want = torch.stack(values).view(out, width)
    assert (want - w).abs().max() < 0.16 * w.abs().max()
    for first, last in [(0, out), (1, 2), (2, out), (3, 3)]:
        assert torch.equal(source.rows(first, last), want[first:last])
    assert source.encoded(quant.NF4(), 0, 2) is None  # a row of ours has blocks of its own


def test_bnb_codes_may_lie_in_wider_numbers(tmp_path: Path) -> None:
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "wide").mkdir()
    _, _, narrow = bnb(tmp_path, **settings)
    _, _, wide = bnb(tmp_path / "wide", **settings, bnb_4bit_quant_storage=torch.bfloat16)
    assert wide[f"{LAYER}.weight"].dtype == torch.bfloat16
    one, other = (
        prequantized.read({"quant_method": "bitsandbytes"}, files)[f"{LAYER}.weight"]
        for files in (narrow, wide)
    )
    assert torch.equal(one.rows(3, 20), other.rows(3, 20))
    for a, b in zip(*(s.encoded(quant.NF4(), 3, 20) for s in (one, other)), strict=True):
        assert torch.equal(a, b)


def test_bnb_int8_is_int8_here(tmp_path: Path) -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    model, settings, files = bnb(tmp_path, load_in_8bit=True)
    found = prequantized.read(settings, files)
    layer = model.get_submodule(LAYER)
    want = int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    source = found[f"{LAYER}.weight"]
    assert torch.allclose(source.rows(2, 9), want[2:9], rtol=1e-6)
    code, scale = source.encoded(quant.Int8(), 2, 9)
    assert torch.equal(code.view(torch.int8), layer.weight.data[2:9])
    decoded = quant.Int8().decode(code, scale, want.shape[1], torch.float32)
    assert torch.equal(decoded, source.rows(2, 9))
    assert source.encoded(quant.NF4(), 2, 9) is None


def fp8(w: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """One scale a block, the last cut where the sizes do not divide."""
    out, width = w.shape
    grid = torch.empty(-(-out // block[0]), -(-width // block[1]))
    packed = torch.empty(w.shape, dtype=torch.float8_e4m3fn)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            at = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            grid[i, j] = w[at].abs().max() / 448
            packed[at] = (w[at] / grid[i, j]).to(torch.float8_e4m3fn)
    return packed, grid


def plain_linears(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    llama(folder)
    tensors = load_file(folder / "model.safetensors")
    return tensors, [name for name in tensors if "_proj" in name]


@pytest.mark.parametrize("form", ["weight_scale_inv", "scale", "qscale_weight"])
def test_fp8_blocks_are_what_transformers_loads(form: str, tmp_path: Path) -> None:
    tensors, names = plain_linears(tmp_path)
    for name in names:
        tensors[name], scale = fp8(tensors[name], (32, 64))
        tensors[f"{name.removesuffix('.weight')}.{form}"] = scale
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": "fp8", "weight_block_size": [32, 64]}
    config["quantization_config"] = settings
    (tmp_path / "config.json").write_text(json.dumps(config))
    want = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    found = prequantized.read(settings, sources(tensors))
    assert set(found) == set(want)
    for name in names:
        assert torch.equal(found[name].rows(7, 32), want[name][7:32])


@pytest.mark.parametrize("shape", [(1,), (), (40,), (40, 1)])
def test_fp8_scales_of_tensor_and_row(shape: tuple[int, ...]) -> None:
    packed, scale = torch.randn(40, 24).to(torch.float8_e4m3fn), torch.rand(shape) + 0.1
    files = sources({"x.weight": packed, "x.weight_scale": scale, "x.input_scale": torch.ones(1)})
    for method in ("fp8", "fbgemm_fp8", "compressed-tensors"):
        found = prequantized.read({"quant_method": method}, files)
        assert list(found) == ["x.weight"]
        want = packed.float() * (scale if scale.numel() == 1 else scale.view(40, 1))
        assert torch.equal(found["x.weight"].rows(3, 30), want[3:30])


def test_fp8_blocks_may_be_cut_and_experts_fused() -> None:
    experts = [fp8(torch.randn(40, 72), (16, 16)) for _ in range(3)]
    packed, scale = (torch.stack(parts) for parts in zip(*experts, strict=True))
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    tensors = {"e.up": packed, "e.up_scale_inv": scale, "x.weight": packed[1]}
    tensors["x.weight_scale_inv"] = scale[1]
    found = prequantized.read(settings, sources(tensors))
    grown = scale.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :40, :72]
    want = packed.float() * grown
    assert torch.equal(found["e.up"].rows(1, 3), want[1:])
    assert torch.equal(found["x.weight"].rows(15, 33), want[1, 15:33])


def test_fp8_exponents_alone() -> None:
    packed = torch.randn(32, 64).to(torch.float8_e4m3fn)
    scale = torch.randint(120, 130, (32, 2), dtype=torch.uint8)
    files = sources({"x.weight": packed, "x.weight_scale_inv": scale})
    found = prequantized.read({"quant_method": "mxfp8"}, files)["x.weight"]
    want = packed.float() * (2.0 ** (scale.float() - 127)).repeat_interleave(32, 1)
    assert torch.equal(found.rows(1, 9), want[1:9])


def pack(codes: Tensor, bits: int, order: list[int] | None = None) -> Tensor:
    """Columns (r, n) -> int32 (r, n * bits / 32), one number after the other."""
    each = 32 // bits
    order = order or list(range(each))
    table = codes.tolist()
    rows = []
    for row in table:
        words = []
        for i in range(0, len(row), each):
            word = sum(row[i + order[k]] << (bits * k) for k in range(each))
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def grouped(bits: int, order: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, zeros, scales, w) of a layer with 48 outputs."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (len(order), 48), generator=generator)
    zeros = torch.randint(1, 2**bits, (groups, 48), generator=generator)
    scales = (torch.rand(groups, 48, generator=generator) * 0.1).half()
    w = torch.empty(48, len(order))
    for i, g in enumerate(order.tolist()):
        w[:, i] = scales[g].float() * (codes[i] - zeros[g])
    return codes, zeros, scales, w


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("acts", [False, True])
def test_gptq_is_dequantized(bits: int, form: str, acts: bool) -> None:
    order = torch.arange(64) // 16
    order = order[torch.randperm(64)] if acts else order
    codes, zeros, scales, w = grouped(bits, order, 4)
    stored = zeros - 1 if form == "gptq" else zeros
    tensors = {
        "x.qweight": pack(codes.T, bits).T.contiguous(), "x.qzeros": pack(stored, bits),
        "x.scales": scales, "x.g_idx": order.int(), "x.bias": torch.ones(48),
    }  # fmt: skip
    if not acts:
        del tensors["x.g_idx"]  # older files have none
    settings = {"quant_method": "gptq", "bits": bits, "checkpoint_format": form}
    found = prequantized.read(settings, sources(tensors))
    assert set(found) == {"x.weight", "x.bias"}
    assert found["x.weight"].shape == (48, 64)
    for first, last in [(0, 48), (3, 29)]:
        assert torch.equal(found["x.weight"].rows(first, last), w[first:last])


def test_awq_is_dequantized() -> None:
    order = torch.arange(64) // 32
    codes, zeros, scales, w = grouped(4, order, 2)
    columns = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {
        "x.qweight": pack(codes, 4, columns), "x.qzeros": pack(zeros, 4, columns),
        "x.scales": scales,
    }  # fmt: skip
    files = sources(tensors)
    settings = {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": 32}
    found = prequantized.read(settings, files)["x.weight"]
    for first, last in [(0, 48), (3, 29), (16, 24), (47, 48)]:
        assert torch.equal(found.rows(first, last), w[first:last])
    assert not found.by_rows  # they lie across the file's


def test_mxfp4_experts_are_what_transformers_makes() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8)
    exponents = torch.randint(120, 130, (3, 8, 2), dtype=torch.uint8)
    files = sources(
        {"e.up_blocks": blocks, "e.up_scales": exponents, "e.up_bias": torch.ones(3, 8)}
    )
    found = prequantized.read({"quant_method": "mxfp4"}, files)
    assert set(found) == {"e.up", "e.up_bias"}
    want = convert_moe_packed_tensors(blocks, exponents)
    assert found["e.up"].shape == want.shape == (3, 64, 8)
    assert torch.equal(found["e.up"].rows(1, 3), want[1:])


def test_a_base_without_settings_is_passed_on() -> None:
    files = sources({"x.weight": torch.ones(4, 4), "x.masked_bias": torch.ones(4).bool()})
    assert prequantized.settings_of({}) == {}
    assert prequantized.read({}, files) == files


@pytest.mark.parametrize("method", ["hqq", "aqlm", "eetq", "torchao", "quark", "vptq", "gguf", "x"])
def test_other_methods_are_refused_by_name(method: str) -> None:
    with pytest.raises(UserError, match=f"quant_method={method} of the base is not read") as caught:
        prequantized.read({"quant_method": method}, sources({"x.weight": torch.ones(4, 4)}))
    assert "unquantized checkpoint" in str(caught.value)
    assert "\n" not in str(caught.value)


W, Q = torch.ones(8, 8), torch.ones(8, 8).to(torch.float8_e4m3fn)
BNB, CT = "bitsandbytes", "compressed-tensors"
STATE = {"x.weight.quant_state.bitsandbytes__nf4": W.view(-1).byte()}
THREE = {"x.qweight": W.int(), "x.qzeros": W[:1, :3].int(), "x.scales": torch.ones(1, 32)}
BAD: list[tuple[str | None, dict[str, Any], dict[str, Tensor], str]] = [
    (CT, {}, {"x.weight": W, "x.weight_scale": W}, "weight_scale"),
    (CT, {}, {"x.weight_packed": W.int()}, "weight_packed"),
    (None, {}, {"x.weight": W, "x.weight_scale": W}, "x.weight_scale"),
    (None, {}, {"x.weight": Q}, "'x.weight' .float8_e4m3fn"),
    (None, {}, {"x.weight": W.byte()}, "'x.weight' .uint8"),
    ("fp8", {}, {"x.weight": Q}, "'x.weight'"),
    ("fp8", {}, {"x.weight": Q, "x.weight_scale_inv": W[:3, :3]}, "does not fit"),
    (BNB, {}, {"x.weight": W.byte()}, "'x.weight' .uint8"),
    (BNB, {}, {"x.weight": W, "x.weight.absmax": W}, "absmax"),
    (BNB, {}, STATE, "not packed as it says"),
    (BNB, {}, {"x.SCB": W[0]}, "no tensor 'x.weight'"),
    ("gptq", {}, {"x.qweight": W.int()}, "no tensor 'x.qzeros'"),
    ("gptq", {"checkpoint_format": "marlin"}, {}, "marlin"),
    ("gptq", {}, THREE, "3 bits"),
    ("gptq", {}, {"x.qweight": W[0], "x.qzeros": W[0], "x.scales": W[0]}, "not packed as it says"),
    ("awq", {"version": "gemv"}, {}, "gemv"),
    ("mxfp4", {}, {"x_blocks": torch.ones(1, 2, 2, 16)}, "no tensor 'x_scales'"),
]


@pytest.mark.parametrize(("method", "more", "tensors", "words"), BAD)
def test_a_scale_is_never_ignored(
    method: str | None, more: dict[str, Any], tensors: dict[str, Tensor], words: str
) -> None:
    settings = {"quant_method": method, **more} if method else {}
    with pytest.raises(UserError, match=words) as caught:
        prequantized.read(settings, sources(tensors))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("broken", [[], "fp8", {"bits": 4}, {"quant_method": 4}])
def test_settings_without_a_method_are_refused(broken: Any) -> None:
    if not broken:
        assert prequantized.settings_of({"quantization_config": broken}) == {}
        return
    with pytest.raises(UserError, match="names no quant_method"):
        prequantized.settings_of({"quantization_config": broken})


def test_what_bitsandbytes_skipped_stays_plain() -> None:
    text = {"text_config": {"quantization_config": {"quant_method": "fp8"}}}
    assert prequantized.settings_of(text) == {"quant_method": "fp8"}
    kept = prequantized.keeps(
        {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "q_proj"]}
    )
    assert kept("model.layers.0.self_attn.q_proj")
    assert kept("lm_head")
    assert not kept("model.layers.0.self_attn.k_proj")
    assert not prequantized.keeps({})("model.layers.0.self_attn.q_proj")


def ours(folder: Path, precision: str = "fp32", **settings: Any) -> Any:
    files = Weights(folder)
    config = hub.ModelConfig(path=str(folder), **settings)
    model = structure.build(config, folder, precision, files)
    structure.materialize(model, torch.device("cpu"))
    for _ in load_weights(model, files):
        pass
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(128, (2, 17), generator=torch.Generator().manual_seed(3))
    return model(input_ids=ids).logits.float()


@pytest.mark.parametrize("double", [False, True])
def test_a_bnb_base_is_the_model_that_transformers_loads(double: bool, tmp_path: Path) -> None:
    bnb(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    folder = tmp_path / "small"
    # Its forward is in bf16 whatever the dtype asked for, and repacks the weights on some CPUs.
    rough = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    want = logits(AutoModelForCausalLM.from_pretrained(folder).dequantize().float())
    assert (rough - want).abs().max() < 2e-2 * want.abs().max()
    assert (logits(ours(folder)) - want).abs().max() < 1e-5
    model = ours(folder, quant="nf4")
    # transformers decodes to bf16, the dtype in which the base was quantized; here fp32 stays.
    assert (logits(model) - want).abs().max() < 5e-3 * want.abs().max()
    files = load_file(folder / "model.safetensors")
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, quant.QuantLinear)
    assert torch.equal(layer.weight.flatten(), files[f"{LAYER}.weight"].flatten())
    assert (logits(ours(folder, quant="int8")) - want).abs().max() < 0.1 * want.abs().max()


def test_modules_that_transformers_leaves_plain_stay_so(tmp_path: Path) -> None:
    skipped = ["q_proj", "lm_head"]
    bnb(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    model = ours(tmp_path / "small", quant="nf4")
    stored = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, quant.QuantLinear)
    }
    assert stored == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    want = logits(theirs.dequantize().float())
    assert (logits(model) - want).abs().max() < 5e-3 * want.abs().max()


def test_experts_in_fp8_are_fused_as_transformers_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [n for n in tensors if "experts" in n or "_proj" in n]:
        tensors[name], tensors[f"{name}_scale_inv"] = fp8(tensors[name], (32, 32))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    want = logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    assert (logits(ours(tmp_path)) - want).abs().max() < 1e-5
    assert (logits(ours(tmp_path, quant="nf4")) - want).abs().max() < 0.2 * want.abs().max()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, {"quant": "nf4"}])
def test_a_value_that_is_not_finite_is_refused_by_its_tensor(
    value: float, settings: dict[str, Any], tmp_path: Path
) -> None:
    tensors, _ = plain_linears(tmp_path)
    tensors[f"{LAYER}.weight"][3, 3] = value
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"model.safetensors: '{LAYER}.weight' has values that"):
        ours(tmp_path, **settings)


def test_a_scale_that_is_not_finite_is_refused_by_its_tensor(tmp_path: Path) -> None:
    bnb(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    file = tmp_path / "small/model.safetensors"
    tensors = load_file(file)
    tensors[f"{LAYER}.weight.absmax"][3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    for settings in ({}, {"quant": "nf4"}):
        with pytest.raises(UserError, match=f"'{LAYER}.weight'.* not finite"):
            ours(tmp_path / "small", **settings)


def merged(folder: Path, out: Path, **settings: Any) -> Path:
    """The merge of a LoRA over the base in a folder, which stock transformers loads."""
    run_dir = make_run(out / "run", folder, "lora", **settings)
    merge.run(str(run_dir), str(out / "merged"), [], "original", "base")
    return out / "merged"


def test_a_merge_writes_codes_as_numbers_of_the_dtype_in_config_json(
    tmp_path: Path, capsys: Any
) -> None:
    """Though they are decoded in fp32, config.json says bf16."""
    tensors, linears = plain_linears(tmp_path / "base")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    for name in linears:
        tensors[name], scale = fp8(tensors[name].float(), (64, 64))
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    held = json.loads((tmp_path / "base/config.json").read_text())
    changes = {
        "quantization_config": settings,
        "pad_token_id": 128,
        "dtype": "bfloat16",
    }  # beyond the vocabulary
    (tmp_path / "base/config.json").write_text(json.dumps(held | changes))
    out = merged(tmp_path / "base", tmp_path)
    written = load_file(out / "model.safetensors")
    assert {t.dtype for t in written.values()} == {torch.bfloat16}
    assert written.keys() == {n for n in tensors if not n.endswith("_scale_inv")}
    AutoModelForCausalLM.from_pretrained(out)
    assert "rounding" not in capsys.readouterr().err


def test_a_merge_over_the_files_own_bytes_has_the_rounding_of_training(
    tmp_path: Path, capsys: Any
) -> None:
    bnb(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    merged(tmp_path / "small", tmp_path, quant="nf4")
    assert "whose rounding" not in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    merged(tmp_path / "plain", tmp_path / "other", quant="nf4")
    assert "whose rounding" in capsys.readouterr().err


@pytest.mark.parametrize("double", [False, True])
def test_a_bnb_base_trains_as_with_transformers_and_peft(double: bool, tmp_path: Path) -> None:
    """The same rows and start: losses and, after three steps, adapters. Theirs computes with what
    its layers decode to, as its CPU kernel would be in bf16.
    """
    bnb(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    folder = tmp_path / "small"
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder).dequantize().float()
    asked = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(theirs, asked)
    mine = ours(folder, quant="nf4")
    loss.add_token_loss(mine)
    targets = {"target_modules": ["q_proj", "down_proj"]}
    inject.inject(mine, {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.0, **targets})
    for name, adapter in inject.adapters(mine):
        layer = theirs.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data.copy_(adapter.A)
    ids = torch.randint(128, (4, 33), generator=torch.Generator().manual_seed(5))
    losses = []
    for model in (mine, theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
        losses.append([])
        for _ in range(4):
            if model is mine:
                value = model(ids, token_labels=ids, loss_chunk=64) / (4 * 32)
            else:
                value = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses[-1].append(value.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0] - 0.02
