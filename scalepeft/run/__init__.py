"""A run's folder: checkpoints, lease, logs, provenance."""
