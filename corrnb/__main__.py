"`python -m corrnb` is the command `corrnb`"
import sys

from corrnb.cli import main

sys.exit(main())
