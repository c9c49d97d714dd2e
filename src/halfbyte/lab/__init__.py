"""The experiments: tasks, models, data, the trainer and its records. Only ``halfbyte[lab]`` needs this folder.

Nothing is imported here, so that ``import halfbyte`` stays free of Lightning, scikit-learn, Typer and Rich. Start at
`halfbyte.lab.trainer.train` (one run) or `halfbyte.lab.compare.compare` (several recipes, several seeds).
"""
