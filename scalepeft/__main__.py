"""``python -m scalepeft``, also under torchrun, srun and accelerate launch."""

import sys

from scalepeft.cli import main

sys.exit(main())
