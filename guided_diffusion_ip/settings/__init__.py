"""Flags, YAML and the command line -> values: the only room that knows flag names.

flags          every flag, once
config         default < YAML < command line; how scripts end
edm            EDM's networks and losses from flags
sampling       what image_sample and its siblings share
sample_checks  combinations of sampling flags without a meaning
lambda_file    the YAML with lambda(t), written by calibrate_eps and read by --eps_schedule
training       what the training scripts share
measuring      what exposure_bias and calibrate_eps share
evaluation     what evaluator and make_reference share
"""
