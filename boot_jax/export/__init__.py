"""A finished student in forms that others can run: PyTorch, plain weights, StableHLO.

folding    what is constant in a finished student, and where a stock network holds it
diffusers  the folder that PyTorch diffusers loads and runs in one step
artifact   one file that jax alone runs
card       README.md: what the student is, and how each form is used
folder     all of them in one folder, whole or not at all
"""
