"""Compiled passes over chunks: convert, exact reduce, fused update, state hash.

Reading order: `formats` (one element), `convert`, `reduce`, `hashing`, `update`, `compile`. Nothing is
imported here, so that a role pays for numba only when it asks for a kernel.
"""
