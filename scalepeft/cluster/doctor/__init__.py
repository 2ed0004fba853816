"""Whether a run can start here."""
