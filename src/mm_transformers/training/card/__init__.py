"""The model card: what is known of a model, its data and its training, written so that a person's edits survive."""
