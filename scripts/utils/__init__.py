"""What every room uses: errors, files, the launcher, command lines, tables. It imports no other room."""

import os

# CPU threads that wait for each other soon go to sleep: by default they spin, which made the demo 5 to 10 times slower
# where cores were shared; sleeping at once costs a third where they are not. Here, since OpenMP reads it when torch is
# loaded, and every script imports something of this room before that.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
