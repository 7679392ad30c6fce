"""What every test shares: one thread for each process, and memory that is not given back to the system too eagerly."""

import os

# Before torch is imported, and for the commands that tests start: with two test processes on two cores, more threads
# only get in each other's way; the allocator's thresholds make convolutions on a CPU about twice as fast.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**34))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**34))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("nnUNet_compile", "f")
