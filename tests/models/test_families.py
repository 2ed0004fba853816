"""Every family of the table: our model is the one that stock transformers makes of the same folder.

``FAMILIES`` (tests/support/families.py) has the checkpoints, docs/models.md what comes out.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, IDS, MASKED, PADDED, answers, make, page, stock
from family_runs import settings
from processes import FULL, ROOT, Job, losses
from safetensors.torch import load_file
from torch import Tensor, nn

from scalepeft.adapters import inject as injection
from scalepeft.adapters.base import dropout_keys
from scalepeft.build import build
from scalepeft.cluster.doctor.against import put_stored_values
from scalepeft.config import schema as cfg
from scalepeft.core.errors import UserError
from scalepeft.data.tokens import TokenSet
from scalepeft.eval.generation import Generator
from scalepeft.export import merge
from scalepeft.export import peft as export
from scalepeft.models import attention, quant
from scalepeft.models.hub import open_base
from scalepeft.parallel.base import full_shape
from scalepeft.parallel.ranks import Ranks
from scalepeft.trainer import Trainer, batches, summed_loss

SUPPORTED = [name for name, family in FAMILIES.items() if not family.refused]
QUICK = ["llama-tied", "qwen3", "gemma3", "granite", "phi3", "mixtral", "qwen3-moe", "gpt-oss",
         "deepseek-v3", "gemma3-multimodal"]  # fmt: skip
supported = pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SUPPORTED]
)
quick = pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in SUPPORTED]
)
LABELS = IDS.masked_fill(torch.arange(IDS.shape[1]) % 5 == 2, -100)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("families")
    return cache(lambda name: make(name, folder / name))


def ours(config: cfg.RunConfig, adapted: bool = False) -> Any:
    """Built as a training builds it; what no tensor was read into holds NaN."""
    ranks = Ranks()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        built = build(config, open_base(config.model, ranks), ranks, lambda: None, adapted)
    finally:
        torch.use_deterministic_algorithms(False)
    built.engine.attach(built.model, None)
    return built.model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """An adapter off its start."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: 0.1 * torch.randn(full_shape(p), generator=generator)
        for name, p in injection.trainable(model).items()
    }


def reference_loss(logits: Tensor) -> Tensor:
    rows, labels = logits[:, :-1].flatten(0, 1).float(), LABELS[:, 1:].flatten()
    return nn.functional.cross_entropy(rows, labels, reduction="sum")


def near(got: Tensor, want: Tensor, what: str = "", limit: float = 1e-5) -> None:
    assert torch.isfinite(got).all(), what
    worst = (got - want).abs().max().item()
    assert worst <= limit * max(1.0, want.abs().max().item()), f"{what}: off by {worst:.1e}"


@supported
@pytest.mark.parametrize("storage", ["none", "nf4"])
def test_logits_and_loss_are_those_of_transformers(
    name: str, storage: str, checkpoint: Any, tmp_path: Path
) -> None:
    folder, refused = checkpoint(name), FAMILIES[name].no_nf4
    if storage != "none" and refused:
        with pytest.raises(UserError, match=refused):
            ours(settings(tmp_path, folder, storage))
        return
    model, reference = ours(settings(tmp_path, folder, storage)), stock(folder)
    if storage != "none":
        assert put_stored_values(model, reference)
    with torch.no_grad():
        want = reference(input_ids=IDS).logits
        loss = model(input_ids=IDS, token_labels=LABELS, loss_chunk=16)
        near(model.eval()(input_ids=IDS).logits, want, "logits")
    assert want.std() > 0.03
    assert loss.item() == pytest.approx(reference_loss(want).item(), rel=1e-5)


@supported
def test_packed_rows_are_trained_as_padded_ones(name: str, checkpoint: Any, tmp_path: Path) -> None:
    config = settings(tmp_path, checkpoint(name), "none")
    config = replace(config, adapter=replace(config.adapter, dropout=0.2))
    ranks = Ranks()
    built = build(config, open_base(config.model, ranks), ranks, lambda: None)
    trainer = Trainer(config, ranks, built, "")
    assert trainer.packed == (name not in PADDED), built.unpacked
    if not trainer.packed:
        return
    model: Any = built.model
    rows_alone = model.config.get_text_config()._attn_implementation == attention.NAME
    assert rows_alone == (name not in MASKED)
    injection.load_state(built.model, state_of(built.model), "test")
    lengths, generator = [24, 9, 31, 16], torch.Generator().manual_seed(3)
    tokens = torch.randint(5, 300, (sum(lengths),), dtype=torch.int32, generator=generator)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    rows = TokenSet(tokens, offsets, torch.tensor([1, 4, 9, 2], dtype=torch.int32), 0, 0, 0)
    found = []
    for packed in (False, True):
        trainer.packed = packed
        (batch,) = batches(trainer, rows, 0, 1)
        assert all((m.positions is not None) == packed for m in batch.micro)
        total = torch.zeros(())
        for micro in batch.micro:
            for dropout in trainer.dropouts:
                dropout.keys, dropout.positions = dropout_keys(micro.samples, 5), micro.positions
            total = total + summed_loss(built.model, micro, config)
        found.append([total, *torch.autograd.grad(total, list(trainer.trained.values()))])
    for want, got in zip(*found, strict=True):
        near(got.detach(), want.detach(), name, limit=3e-5)


@quick
def test_greedy_tokens_are_those_of_generate(name: str, checkpoint: Any, tmp_path: Path) -> None:
    folder, prompts = checkpoint(name), [IDS[0].tolist(), IDS[1, 5:].tolist()]
    config = settings(tmp_path, folder, "none")
    model, tokenizer = ours(config).eval(), open_base(config.model, Ranks()).tokenizer
    generator = Generator(model, tokenizer, config.evaluate, torch.device("cpu"), False)
    got = answers(generator, prompts, [6, 6])
    padded = torch.tensor([prompts[0], [1] * 5 + prompts[1]])
    mask = torch.ones_like(padded)
    mask[1, :5] = 0
    want = stock(folder).generate(
        input_ids=padded, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    assert [a + [1] * (6 - len(a)) for a in got] == want[:, padded.shape[1] :].tolist()


@quick
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_gradients_of_a_lora_are_those_of_peft(name: str, checkpoint: Any, tmp_path: Path) -> None:
    folder = checkpoint(name)
    model = ours(settings(tmp_path, folder, "none"), adapted=True)
    injection.load_state(model, state_of(model), "here")
    state, layers = {}, dict(injection.adapted_layers(model))
    for layer, module in layers.items():
        fields, tensors = module.adapter.to_peft(quant.Frozen(module))
        state |= {f"base_model.model.{layer}.{key}": value for key, value in tensors.items()}
    fields.pop("peft_type")
    reference = stock(folder)
    reference.config.model_type = "any"  # else PEFT takes a shared expert's up_proj for experts'
    theirs = peft.get_peft_model(reference, peft.LoraConfig(target_modules=list(layers), **fields))
    assert peft.get_peft_model_state_dict(theirs).keys() == state.keys()
    peft.set_peft_model_state_dict(theirs, state)
    loss = reference_loss(theirs(input_ids=IDS).logits)
    loss.backward()
    got = model(input_ids=IDS, token_labels=LABELS, loss_chunk=16)
    assert got.item() == pytest.approx(loss.item(), rel=1e-5)
    got.backward()
    grads = {key.replace(".default", ""): p.grad for key, p in theirs.named_parameters()}
    for key, p in injection.trainable(model).items():
        layer, _, part = key.partition(".adapter.")
        want = grads[f"base_model.model.{layer}.lora_{part}.weight"]
        assert want.abs().max() > 0, key
        near(p.grad, want, key, limit=2e-5)


@quick
def test_a_merge_loads_in_transformers(name: str, checkpoint: Any, tmp_path: Path) -> None:
    folder = checkpoint(name)
    model, run_dir = write_run(settings(tmp_path / "run", folder, "none"))
    merge.run(str(run_dir), str(tmp_path / "merged"), [], "original", "base")
    with torch.no_grad():
        want, base = model(input_ids=IDS).logits, stock(folder)(input_ids=IDS).logits
        near(stock(tmp_path / "merged")(input_ids=IDS).logits, want)
        assert (want - base).abs().max() > 0.1, "the adapter does nothing"


@quick
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_an_export_loads_in_peft(name: str, checkpoint: Any, tmp_path: Path) -> None:
    folder, out = checkpoint(name), tmp_path / "out"
    model, run_dir = write_run(settings(tmp_path / "run", folder, "none"))
    if FAMILIES[name].no_export:
        with pytest.raises(UserError, match=r"HF PEFT takes .* for a layer of the experts"):
            export.run(str(run_dir), str(out), [], "peft")
        return
    export.run(str(run_dir), str(out), [], "peft")
    theirs = peft.PeftModel.from_pretrained(stock(folder), str(out)).eval()
    with torch.no_grad():
        near(theirs(input_ids=IDS).logits, model(input_ids=IDS).logits)


def write_run(config: cfg.RunConfig) -> tuple[Any, Path]:
    """The adapted model, and a finished run with that adapter."""
    from finished import write_adapter

    run_dir = Path(config.run_dir)
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(cfg.dump(config))
    model, base = ours(config, adapted=True).eval(), open_base(config.model, Ranks())
    state = state_of(model)
    injection.load_state(model, state, "here")
    kind = {key: getattr(config.model, key) for key in ("path", "quant", "double_quant")}
    write_adapter(run_dir, state, {
        "adapter": cfg.to_dict(config.adapter), "step": 2, "length": [2, None],
        "base_model": {**kind, "revision": None, "fingerprint": base.fingerprint},
    })  # fmt: skip
    return model, run_dir


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_fsdp2_ranks_train_as_one_process(checkpoint: Any, tmp_path: Path) -> None:
    names = SUPPORTED if FULL else QUICK
    folders = [str(checkpoint(name)) for name in names]
    program = (str(ROOT / "tests/models/family_runs.py"),)
    for ranks, runs in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        runs.mkdir()
        codes, text = Job(ranks, [str(runs), *folders], program=program).wait(600)
        assert codes == [0] * ranks, text
    failed = []
    for name in names:
        errors = [f.read_text() for f in tmp_path.glob(f"*/{name}.error")]
        if not errors:
            one, two = tmp_path / "one" / name, tmp_path / "two" / name
            files = [run / "adapter/adapter_model.safetensors" for run in (one, two)]
            want, got = map(load_file, files)
            near(torch.tensor(losses(two)), torch.tensor(losses(one)), name)
            # Adam's first steps have the size of lr, however small and noisy a gradient is.
            errors = [key for key in want if (want[key] - got[key]).abs().max() > 1e-3]
        failed += [f"{name}: {errors[0]}"] if errors else []
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - set(SUPPORTED)))
def test_a_family_that_is_not_supported_is_refused_in_one_line(
    name: str, checkpoint: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        ours(settings(tmp_path, checkpoint(name), "none"), adapted=True)
    assert FAMILIES[name].refused in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_table_is_in_the_docs() -> None:
    assert (ROOT / "docs/models.md").read_text() == page(), (
        "python tests/support/families.py --docs > docs/models.md"
    )
