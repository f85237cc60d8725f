"""Searches over steps of reasoning, and programs of prompts."""
