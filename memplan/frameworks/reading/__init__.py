"""Run files of training frameworks, read as the run that the framework would start.

`run_file.py` is the door. Each framework has a module with its rules; `defaults/` has its keys, and its defaults by
version.
"""
