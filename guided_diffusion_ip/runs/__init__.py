"""Resumable work into a folder: the same command again continues it.

sample_batch  a batch of images whose noise has an address
samples       a sampling run: all images of one set -> npz and grid
likelihood    a likelihood run: bits per dimension of a set of images
folder        a run's folder: what it was made with, and its refusal of anything else
shards        results on disk as they are produced, joined in the end
progress      the bar
sampler_text  settings -> what samples, in words
base_images   which output of super-resolution belongs to which input
"""
