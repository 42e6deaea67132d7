"""How fast training and sampling are, and how near to what this machine can do.

    machine   what it is, how fast it multiplies matrices, how much memory something took
    rows      one measured thing each: a training step, a network call of sampling
    report    rows -> table and JSON

A further thing to measure is one more function in rows that returns a Row.
"""
