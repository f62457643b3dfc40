"""Ebbtide: continuous data protection and replication of Linux block volumes."""
