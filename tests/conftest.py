"""Tests run beside each other on small machines: one torch thread is as fast for tiny models, and repeatable."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
