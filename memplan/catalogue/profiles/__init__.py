"""Profiles: what each version of a framework or serving engine does by default."""
