"""What every training script does beside training. Nothing here learns, and nothing imports a script."""

import os

# One thread is fastest for networks this small, and lets seeds run side by side. NumPy and PyTorch read this
# when they are imported, which is why the scripts import this package before them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
