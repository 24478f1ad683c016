"""What the parent of all test workers imports, once."""

import os

from training import preload

os.environ.setdefault("OMP_NUM_THREADS", "1")
preload.run("cpu")
