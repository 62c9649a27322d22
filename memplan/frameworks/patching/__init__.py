"""Changes of a run as patches of the file that it was read from.

`patch.py` is the door. `yaml_text.py`, `json_text.py` and `script_text.py` change values by their position, so that all
other text stays as it is.
"""
