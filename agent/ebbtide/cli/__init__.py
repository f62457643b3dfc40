"""The command line `ebb`. It talks to an agent; it never touches a log or a volume itself."""
