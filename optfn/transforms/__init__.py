"""Blocks that are no algorithm of their own."""
