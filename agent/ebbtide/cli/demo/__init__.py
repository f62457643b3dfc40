"""`ebb demo`: real processes, a real database, an accident, and the proof that it is undone."""
