"""The target side of an agent: journals, views, restore."""
