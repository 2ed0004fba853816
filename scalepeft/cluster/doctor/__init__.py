"""Whether a run can start here: a file a group of checks (machine, links, inputs, run_folder), each
probed on the ranks and judged on rank 0 (check, rendezvous); command runs them and prints.
"""
