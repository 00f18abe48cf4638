"""What a model looks at when it answers: one file for each step from a row to a picture of the answer's reasons."""
