"""The model card: facts about a model, its data and its training. Edits by a person are kept."""
