"""The frozen base: where it comes from, its structure, weights, 4-bit storage and loss."""
