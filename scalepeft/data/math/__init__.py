"""Math answers: extraction, equivalence, contamination."""
