"""What the parent of all test workers imports, once."""

import gc
import os

from training.process import preload

os.environ.setdefault("OMP_NUM_THREADS", "1")
preload.run("cpu")
gc.collect()
gc.freeze()  # or the first collection in each worker would copy every page that they share: half a second a worker
