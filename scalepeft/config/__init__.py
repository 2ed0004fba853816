"""Typed settings from YAML files and the command line."""
