"""The ground: errors, fields, files, text, statistics, Slurm. Imports nobody."""
