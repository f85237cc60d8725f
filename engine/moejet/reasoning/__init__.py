"""Thinking: telling reasoning from answer."""
