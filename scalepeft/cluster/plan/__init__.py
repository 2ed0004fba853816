"""Memory, traffic and times of a training from its config alone."""
