"""Methods timed against HF PEFT."""
