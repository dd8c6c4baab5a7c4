import os
import sys

if os.path.basename(sys.argv[0]) in ("-m", "robofactory"):  # a command starts; see `interrupts`
    from robofactory import interrupts

    interrupts.install()
