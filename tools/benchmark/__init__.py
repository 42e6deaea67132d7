"""How fast training and sampling are, how near to what this machine can do, and how much faster
than the published way.

    machine    what it is, how fast it multiplies matrices and copies, how much memory something
               took
    limits     what a step must cost at least: FLOP, bytes
    rows       one measured thing each: a training step, its update alone, a network call of
               sampling
    baseline   the published way of each of them
    gathering  from batches of samples to one file
    loader     training images per second
    startup    how long a script takes to start, and what it imports
    report     rows -> table and JSON

A further thing to measure is one more function in rows that returns a Row.
"""
