"""The source side of an agent: groups, their taps, and shipping their history."""
