"""A folder for sys.path (so that it is installed with the rest, it is a package too): see
guided_diffusion_ip.compat.
"""
