"""Before and around a job: plan, doctor, submit, status."""
