"""Whether a run can start here: checks of machine, links and storage, made on every rank."""
