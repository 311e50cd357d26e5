"""Hides the package of this name from Ray's processes.

Each of them imports jsonschema, which imports the package where it is installed, as the extra `dev` does; it needs 3 s
of a core to compile its grammar. On a busy machine Ray's own agent then misses its limit of 15 s, and its node ends.
"""

raise ImportError("hidden")
