"""Launcher of a tap server: hands the main thread to native code and comes back only to end.

Imports nothing else: opening a view waits for this interpreter.
"""

import os
import sys

from ebbtide import _native

if __name__ == "__main__":
    with os.fdopen(0, "rb") as launch:
        message = launch.read()
    sys.exit(_native.tap_main(message))
