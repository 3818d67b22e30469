"""What the scripts share. The model is not here but in `../model.py`, beside `../config.py`:
those two are published with every checkpoint and run on a stranger's machine without the rest.
"""
