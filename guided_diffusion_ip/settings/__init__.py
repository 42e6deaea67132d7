"""Flags, YAML and the command line -> values: the only room that knows flag names.

flag           what a flag is: its role, its type, its checks
flags          every flag (*_flags) and script, and the lists that follow from roles
yaml_file, config, command    default < YAML < command line; how scripts end
beside, adopt  what lies beside a checkpoint, and how a script takes it over
solver, make_sampler, lambdas, lambda_file    how to step, and by which lambda(t)
sampling, likelihood    requests, frozen and checked; sample_checks: what has no meaning
identity       what a run's results depend on
models, factories, edm, own_network    the registry of networks; networks and processes from flags
training, measuring, evaluation        what the scripts of these share
"""
