"""CPU seconds of layers beside PEFT's LoRA: ``HIDDEN plain|nf4 ROUNDS TOKENS,... [LAYERS]``.

A step is factors, forward, backward with the input's gradient, AdamW, over LAYERS (1) in a row;
median [lowest to highest] of the ratios in turns. One more number: HOFT is fused from so many
tokens for each of its rank.
"""

import sys
import time
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import scalepeft
from scalepeft.adapters import householder
from scalepeft.adapters.factors import Factors
from scalepeft.models import quant
from scalepeft.parallel.base import EngineConfig
from scalepeft.parallel.ranks import Ranks
from scalepeft.parallel.single import Single

METHODS = {
    "lora": {"rank": 16, "dropout": 0.0},
    "hoft": {"rank": 16, "form": "cayley"},
    "shoft": {"rank": 16, "form": "cayley"},
    "goft": {},
}


def networks(hidden: int, kind: str, count: int) -> dict[str, nn.Module]:
    """So many layers each, over the same weights."""
    torch.manual_seed(0)
    made, targets = {}, [str(i) for i in range(count)]
    weights = [nn.Linear(hidden, hidden, bias=False).weight.detach() for _ in targets]
    for name in ("peft-lora", *METHODS):
        layers = [nn.Linear(hidden, hidden, bias=False).requires_grad_(False) for _ in weights]
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data = weight
        if name == "peft-lora":
            if kind != "plain":
                layers = [quant.bnb_linear(layer) for layer in layers]
            config = LoraConfig(r=16, target_modules=targets, lora_dropout=0.0)
            made[name] = get_peft_model(nn.Sequential(*layers), config)
            continue
        for layer in layers if kind != "plain" else ():
            quant.quantize(layer, quant.get_format(kind))
        settings = {"name": name, "target_modules": targets, **METHODS[name]}
        made[name] = scalepeft.inject(nn.Sequential(*layers), settings)
    return made


def main() -> None:
    hidden, kind, rounds, tokens, *more = sys.argv[1:]
    count, *fused = more or ["1"]
    householder.FUSED_FROM = int(fused[0]) if fused else householder.FUSED_FROM
    torch.set_num_threads(1)
    nets = networks(int(hidden), kind, int(count))
    engine = Single(EngineConfig(name="single"), Ranks())
    factors = {name: Factors(net, engine) for name, net in nets.items()}
    optimizers = {
        name: torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], fused=True)
        for name, net in nets.items()
    }

    def step(name: str, x: torch.Tensor, dy: torch.Tensor) -> float:
        begin = time.process_time()
        with factors[name].of_step():
            nets[name](x).backward(dy)
        optimizers[name].step()
        optimizers[name].zero_grad()
        x.grad = None
        return time.process_time() - begin

    for n in map(int, tokens.split(",")):
        x, dy = torch.randn(n, int(hidden), requires_grad=True), torch.randn(n, int(hidden))
        times: dict[str, list[float]] = {name: [step(name, x, dy) * 0] for name in nets}
        turns, repeats = [*nets], max(1, 512 // n)
        for _ in range(int(rounds)):
            for name in turns:
                times[name].append(sum(step(name, x, dy) for _ in range(repeats)) / repeats)
            turns.append(turns.pop(0))
        lora = times["peft-lora"][1:]
        print(hidden, kind, n, f"{count} layers, peft-lora {1e3 * median(lora):.0f} ms", end="")
        for name in METHODS:
            ratios = sorted(a / b for a, b in zip(times[name][1:], lora, strict=True))
            print(f", {name} {median(ratios):.2f} [{ratios[0]:.2f} to {ratios[-1]:.2f}]", end="")
        print(flush=True)


if __name__ == "__main__":
    main()
