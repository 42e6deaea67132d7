"""A fuzzer of everything that reads what others have written: scripts get damaged files and flags.

`mutations.py` damages, `targets.py` says what there is to be damaged and how it is then read,
`running.py` runs one input in a forked child, and judges how it ended.
"""
