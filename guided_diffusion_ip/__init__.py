"""Train, sample, measure and evaluate diffusion models with remedies for exposure bias.

Nothing is imported here, so that `import guided_diffusion_ip.noise` costs only what it uses.
README.md maps concepts to files.
"""

__version__ = "0.1.0"
