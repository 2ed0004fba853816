"""vLLM's greedy tokens, run by .venv-vllm's Python: vllm_tokens.py JOBS PROMPTS OUT, all JSON.

JOBS: name -> keywords of ``LLM``, and ``lora``, a folder; PROMPTS: token ids; OUT: name -> new
tokens of each prompt. One engine after the other in this process: a second costs a second.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    jobs, prompts = (json.loads(Path(path).read_text()) for path in sys.argv[1:3])
    greedy = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    told = {}
    for name, keywords in jobs.items():
        lora = keywords.pop("lora", None)
        more = {"enable_lora": True, "max_lora_rank": 8} if lora else {}
        llm = LLM(dtype="float32", max_model_len=64, enforce_eager=True, seed=0, **keywords, **more)
        found = llm.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in prompts],
            greedy,
            use_tqdm=False,
            lora_request=LoRARequest("adapter", 1, lora) if lora else None,
        )
        told[name] = [list(request.outputs[0].token_ids) for request in found]
        llm.llm_engine.engine_core.shutdown()
    Path(sys.argv[3]).write_text(json.dumps(told))
