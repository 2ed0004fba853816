"""Whether a run can start here: checks of machine, links and storage, made on every rank as check
says, in the order of command, which prints what they found.
"""
