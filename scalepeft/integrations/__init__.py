"""Other systems on a scalepeft run: lm-eval evaluates it."""
