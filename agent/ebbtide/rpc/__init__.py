"""The wire: stubs generated at build from `proto/`, stream framing, credentials."""
