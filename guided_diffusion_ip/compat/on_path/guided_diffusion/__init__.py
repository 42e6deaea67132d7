"""guided_diffusion, provided by guided_diffusion_ip: all its modules are ours, by their published
names.
"""

import sys

from guided_diffusion_ip.compat import register

register(sys.modules[__name__])
