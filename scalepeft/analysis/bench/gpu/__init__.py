"""``scalepeft bench gpu``: is a machine right, and how fast is it."""
