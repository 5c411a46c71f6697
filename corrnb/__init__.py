__version__ = "0.1.0"

import logging

# bitsandbytes looks for an optional kernel when anything imports it first, and says that it is not there
logging.getLogger('bitsandbytes.backends.cpu.ops').addFilter(
    lambda record: not record.getMessage().startswith('Failed to load CPU gemm_4bit_forward'))
