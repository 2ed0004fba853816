"""The adapter protocol, adapters into a model, and the mathematics that methods share."""
