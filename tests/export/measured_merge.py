"""CPU seconds, peak memory and bytes read of a merge: ``measured_merge.py FOLDER lora|hoft``.

lora: 323 MiB in bf16, base original. hoft: 1.03 GB, NF4, base dequantized. Prints one JSON line and
the sha256 of what was written. FOLDER keeps base and run; the merged model is removed.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from finished import make_run

SIZES = {
    "lora": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12},
    "hoft": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 10},
}


def base(folder: Path, kind: str) -> Path:
    import torch
    import transformers

    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    config = transformers.LlamaConfig(
        **SIZES[kind], **heads, vocab_size=8000, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="300MB")
    return folder


def main() -> None:
    folder, kind = Path(sys.argv[1]) / sys.argv[2], sys.argv[2]
    if not (folder / "run").is_dir():
        folder.mkdir(parents=True)
        settings = {} if kind == "lora" else {"quant": "nf4"}
        make_run(folder / "run", base(folder / "base", kind), kind, **settings)
        return
    from scalepeft.export import merge

    out, kept = folder / "out", os.environ.get("COPY")
    settings = [f"model.quantized_cache={kept}"] if kept else []
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    imports, began = sum(os.times()[:2]), time.monotonic()
    merge.run(str(folder / "run"), str(out), settings, ("original", "dequantized")[kind == "hoft"],
              "base")  # fmt: skip
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    print(json.dumps({
        "cpu_s": round(sum(os.times()[:2]) - imports, 1), "imports_s": round(imports, 1),
        "wall_s": round(time.monotonic() - began, 1), "peak_mib": int(status.split()[0]) // 1024,
    }))  # fmt: skip
    for file in sorted(out.iterdir()):
        print(hashlib.sha256(file.read_bytes()).hexdigest()[:16], file.name)
    shutil.rmtree(out)


main()
