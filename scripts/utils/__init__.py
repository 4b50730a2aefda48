"""What every room uses: errors, files, the launcher, command lines, tables. It imports no other room."""

import os

from utils.requirements import check_requirements

# CPU threads that wait for each other soon go to sleep: by default they spin, which made the demo 5 to 10 times slower
# where cores were shared; sleeping at once costs a third where they are not. Here, since OpenMP reads it when torch is
# loaded, and every script imports something of this room before that.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# On a GPU micro-batches of every size come and go: the allocator that grows its blocks leaves no gaps between them, for
# want of which a run can end that its rehearsal has passed. Read when torch first takes GPU memory.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the name until torch 2.9
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
check_requirements()
