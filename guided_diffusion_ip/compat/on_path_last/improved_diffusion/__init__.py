"""improved_diffusion, provided by guided_diffusion_ip: its script_util, and those of its
modules whose API guided_diffusion kept.
"""

import sys

from guided_diffusion_ip.compat import OF_IMPROVED, register

register(sys.modules[__name__], OF_IMPROVED)
