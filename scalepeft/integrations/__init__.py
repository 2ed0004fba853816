"""Other systems on a scalepeft run: vLLM generates for an evaluation, lm-eval evaluates a run."""
