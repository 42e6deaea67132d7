"""Training: the loop and its parts (timestep samplers, averaged weights, precision, checkpoints,
previews).
"""
